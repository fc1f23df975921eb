"""flex::HierarchicalAttention: CachedAttention whose last query also attends to the selected hi-res pages.

Used by the layers after the start layer. Takes the inputs of flex::CachedAttention, then (C*C pages of up to P tokens):

| input | shape | dtype | meaning |
|---|---|---|---|
| page_key, page_value | [B, Hkv, C*C, P, hd] | T | projected pages of this layer, hi-res rotary applied to the keys |
| page_lengths | [C*C] | int64 | valid tokens of each page, at its beginning |
| pages | [B, C*C] | int64 | page indices; the first page_count[b] are read (flex::SelectPages of the layer before) |
| page_count | [B] | int64 | 0 = plain causal attention |

Outputs and attributes: those of flex::CachedAttention, and the attribute `page_size` (P). The last query's context
comes from one softmax over the ordinary keys and the keys of the selected pages; all other queries, and the map, from
the ordinary keys alone (official: attn_output[:, :, -1:] = attn_output_select).

Faces: `reference.py` (PyTorch), `onnx_body.py` (ONNX function for ONNX Runtime), `onnx_static.py` (for TensorRT without
plugins). `kernel.py` (Triton) and `plugin.py` (TensorRT) belong beside them.
"""
