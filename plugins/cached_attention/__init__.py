"""flex::CachedAttention: rotary, KV-cache update, causal attention and the head-summed map; no pages.

Used by the layers up to and including the start layer. H query heads share Hkv key/value heads (H = Hkv * group);
hd = head_dim; L = cache capacity in tokens; T = model dtype (float32, float16 or bfloat16).

| input | shape | dtype | meaning |
|---|---|---|---|
| query | [B, S, H*hd] | T | projected, before rotary, heads side by side |
| key, value | [B, S, Hkv*hd] | T | the same for the new keys and values |
| past_key, past_value | [B, Hkv, L, hd] | T | the cache; the slots at `positions` are written |
| positions | [B, S] | int64 | of the new tokens, consecutive in each row; the first is the number of tokens cached |
| cos, sin | [context, hd/2] | float32 | rotary tables by position (first half; the second half repeats it) |
| image_begin | [B] | int64 | position of the first of G*G image tokens, all within L; 0 when there is no image |

| output | shape | dtype | meaning |
|---|---|---|---|
| context | [B, S, H*hd] | T | attention output, before o_proj |
| present_key, present_value | [B, Hkv, L, hd] | T | the cache after the update; bind it to the same buffer as past_* |
| map | [B, G, G] | float32 | softmax weights of the LAST query on the G*G image tokens, summed over heads |

Attributes: `heads` (H), `kv_heads` (Hkv), `head_dim` (hd), `grid` (G). A token sees the cache slots up to its own
position, so rows of different length may be padded at their end: what padding writes is overwritten before it is seen.

Faces: `reference.py` (PyTorch), `onnx_body.py` (ONNX function for ONNX Runtime), `onnx_static.py` (for TensorRT without
plugins). `kernel.py` (Triton), `launch.py` (its launches, as a TensorRT plugin asks for them).
"""

MASKED = -60000.0  # finite, within float16: its softmax weight is exactly 0, and a fully masked row stays finite
