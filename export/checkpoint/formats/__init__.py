"""The formats of weight files: safetensors and torch.save."""
