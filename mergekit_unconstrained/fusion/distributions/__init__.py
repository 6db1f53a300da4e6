"""What the teachers say: collected, stored, read back."""
