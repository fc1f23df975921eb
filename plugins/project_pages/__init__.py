"""flex::ProjectPages: hi-res features -> keys and values of the listed pages that nobody has projected before.

Runs before flex::HierarchicalAttention in every layer that reads pages: a page that is never selected costs nothing.
N = C*C pages of P tokens; Hkv key/value heads of size hd; T = model dtype.

| input | shape | dtype | meaning |
|---|---|---|---|
| features | [B, N, P, hidden] | T | hi-res features, page by page; a short page may end in anything |
| key_weight, value_weight | [Hkv*hd, hidden] | T | k_proj_hd, v_proj_hd |
| cos, sin | [B, N, P, hd/2] | float32 | hi-res rotary of every token |
| page_key, page_value | [B, Hkv, N, P, hd] | T | the store of this layer; a page not yet projected may hold anything |
| projected | [B, N] | int64 | 1 where the store holds the page, else 0 |
| pages | [B, N] | int64 | page indices; the first page_count[b] are wanted (flex::SelectPages of the layer before) |
| page_count | [B] | int64 | |

| output | shape | dtype | meaning |
|---|---|---|---|
| present_key, present_value | [B, Hkv, N, P, hd] | T | the store with the new pages; bind it to the buffer of page_* |
| present_projected | [B, N] | int64 | `projected`, and the wanted pages |

Attributes: `hidden`, `kv_heads` (Hkv), `head_dim` (hd), `page_size` (P), `cells` (C), and `int8_pages` and `page_slots`
(0 where a node lacks them).

With `int8_pages` = 1 the store takes 8 bits a value: page_* and present_* are int8, two inputs page_key_scale and
page_value_scale [B, Hkv, N, P] float32 follow, and after present_value the outputs present_key_scale and
present_value_scale, which share their buffers. How numbers are kept in 8 bits: plugins/cached_attention; what is
rounded is the projection in T, keys after the rotation in float32.

With `page_slots` = 1 the store has room for fewer pages, in K page slots: page_*, present_* and their scales have K in
place of N, and a last input follows, slots [B, N] int64: the page slot that each new page is written to; other pages
are not looked up. Who gives a page one, and takes it away: export/network/page_slots.py.

Faces: `reference.py` (PyTorch), `onnx_body.py`, `onnx_int8.py` and `onnx_slots.py` (ONNX functions), `kernel.py`
(Triton), `launch.py` (its launches, as a TensorRT plugin asks for them).
"""
