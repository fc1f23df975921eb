"""What the command line shows: a conversation, and pictures of where the model looked."""
