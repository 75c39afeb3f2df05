"""What turns weights into bytes and back."""
