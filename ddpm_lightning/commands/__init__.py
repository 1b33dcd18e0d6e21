"""Commands that start from a checkpoint, one file each, and what they share."""
