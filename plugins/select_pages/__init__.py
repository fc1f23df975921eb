"""flex::SelectPages: the attention map of the last query -> the pages the next layer reads.

| input | shape | dtype | meaning |
|---|---|---|---|
| map | [B, G, G] | float32 | head-summed attention of the last query to the low-res image tokens, row-major |
| margins | [B, 2] | int64 | rows, columns of the map zeroed at each end (the padding of a non-square image) |
| page_budget | [B] | int64 | pages to keep at most; 0 = this row sees no pages, C*C = the official behaviour |

| output | shape | dtype | meaning |
|---|---|---|---|
| pages | [B, C*C] | int64 | every page, best score first (ties: lower index); the first `page_count` are selected |
| page_count | [B] | int64 | number of selected pages, 0 .. min(C*C, page_budget) |

Attributes: `grid` (G), `cells` (C), `threshold` (0..255 scale, strict comparison).

Faces: `reference.py` (PyTorch), `onnx_body.py` (ONNX function for ONNX Runtime), `onnx_static.py` (for TensorRT without
plugins). `kernel.py` (Triton), `launch.py` (its launches, as a TensorRT plugin asks for them).
"""
