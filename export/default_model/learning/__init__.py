"""Training: first the tower (`train_vision.py`, `sheets.py`), then the decoder (`train_decoder.py`, `student.py`)."""
