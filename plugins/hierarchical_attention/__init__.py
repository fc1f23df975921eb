"""flex::HierarchicalAttention: CachedAttention whose last query also attends to the selected hi-res pages.

Used by the layers after the start layer. Takes the inputs of flex::CachedAttention, then (C*C pages of up to P tokens):

| input | shape | dtype | meaning |
|---|---|---|---|
| page_key, page_value | [B, Hkv, C*C, P, hd] | T | projected pages of this layer, hi-res rotary applied to the keys |
| page_lengths | [C*C] | int64 | valid tokens of each page, at its beginning |
| pages | [B, C*C] | int64 | page indices; the first page_count[b] are read (flex::SelectPages of the layer before) |
| page_count | [B] | int64 | 0 = plain causal attention |

With the attribute `int8_pages` = 1 the pages are stored in 8 bits (how: plugins/cached_attention); two inputs follow:

| page_key, page_value | [B, Hkv, C*C, P, hd] | int8 | each value is that many steps of its token and head |
| page_key_scale, page_value_scale | [B, Hkv, C*C, P] | float32 | those steps |

The store is never made float as a whole. Scores, and sums over values, are float32; whether an integer is multiplied by
its step before a product, or what comes out of it, is left to each face.

Outputs and attributes: those of flex::CachedAttention, and the attributes `page_size` (P) and `int8_pages` (0 where a
node lacks it). With `int8_cache` = 1 the scales of the cache follow all other inputs, those of the pages, too. The last
query's context comes from one softmax over the ordinary keys and the keys of the selected pages; all other queries, and
the map, from the ordinary keys alone (official: attn_output[:, :, -1:] = attn_output_select).

Faces: `reference.py` (PyTorch), `onnx_body.py` (ONNX function for ONNX Runtime), `onnx_int8.py` (the same of int8
pages), `onnx_cuda.py` (for its CUDA provider, of either), `onnx_static.py` (for TensorRT without plugins, of either),
`kernel.py` (Triton), `launch.py` (its launches, as a TensorRT plugin asks for them).
"""
