"""What a tensor is before a weight of it is read: its header (`info`) and the kind of layer it belongs to (`kinds`)."""
