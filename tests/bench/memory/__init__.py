"""What a process that answers holds in memory."""
