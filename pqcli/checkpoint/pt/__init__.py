"""`torch.save` files: pickles read as data, and written without pickling."""
