"""The parameters of flash_attn's and fla's functions, in their order and with their defaults."""

from __future__ import annotations

import importlib
import inspect

import pytest

# As flash-attn 2.8 and flash-linear-attention 0.6.0 declare them; what they have for Triton alone is left away.
PUBLISHED = {
    "flash_attn.flash_attn_interface.flash_attn_func": (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn.flash_attn_interface.flash_attn_qkvpacked_func": (
        "qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn.flash_attn_interface.flash_attn_kvpacked_func": (
        "q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn.flash_attn_interface.flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None"
    ),
    "flash_attn.flash_attn_interface.flash_attn_varlen_qkvpacked_func": (
        "qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn.flash_attn_interface.flash_attn_varlen_kvpacked_func": (
        "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False"
    ),
    "flash_attn.flash_attn_interface.flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    "fla._delta.chunk_delta_rule": (
        "q, k, v, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_size=None"
    ),
    "fla._delta.chunk_gated_delta_rule": (
        "q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, "
        "use_gate_in_kernel=False, A_log=None, dt_bias=None, chunk_size=None"
    ),
    "fla._delta.chunk_kda": (
        "q, k, v, g, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, "
        "allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False, state_v_first=False, "
        "cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, A_log=None, dt_bias=None, chunk_size=None"
    ),
    "fla._delta.fused_recurrent_gated_delta_rule": (
        "q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None"
    ),
    "fla._delta.fused_recurrent_kda": (
        "q, k, v, g, beta=None, A_log=None, dt_bias=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, state_v_first=False, "
        "cu_seqlens=None"
    ),
    "fla._linear.chunk_gla": (
        "q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, "
        "cu_seqlens=None, cu_seqlens_cpu=None, chunk_size=None"
    ),
    "fla._linear.chunk_linear_attn": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, cu_seqlens=None, *, "
        "reverse=False, chunk_size=None"
    ),
    "fla._linear.chunk_retention": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, *, reverse=False, "
        "state_v_first=False, chunk_size=None"
    ),
    "fla._linear.chunk_simple_gla": (
        "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_size=None"
    ),
    "fla._linear.fused_recurrent_gla": (
        "q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "state_v_first=False, cu_seqlens=None"
    ),
    "fla._linear.fused_recurrent_simple_gla": (
        "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "state_v_first=False, cu_seqlens=None"
    ),
    "fla.ops.generalized_delta_rule.chunk_dplr_delta_rule": (
        "q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, "
        "lower_bound=None"
    ),
    "fla.ops.generalized_delta_rule.fused_recurrent_dplr_delta_rule": (
        "q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None"
    ),
    "fla.ops.generalized_delta_rule.chunk_iplr_delta_rule": (
        "q, k, v, a, b, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, chunk_size=None"
    ),
    "fla.ops.rwkv6.chunk_rwkv6": (
        "r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, chunk_size=None"
    ),
    "fla.ops.rwkv6.fused_recurrent_rwkv6": (
        "r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None"
    ),
    "fla.ops.rwkv7.chunk_rwkv7": (
        "r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, "
        "lower_bound=None"
    ),
    "fla.ops.rwkv7.fused_recurrent_rwkv7": (
        "r, w, k, v, a, b, scale=None, initial_state=None, output_final_state=True, cu_seqlens=None"
    ),
    "fla.ops.rwkv7.fused_mul_recurrent_rwkv7": (
        "r, w, k, v, kk, a, scale=1.0, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None"
    ),
    "fla.ops.lightning_attn.chunk_lightning_attn": (
        "q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, "
        "cu_seqlens=None, chunk_size=None"
    ),
    "fla.ops.lightning_attn.fused_recurrent_lightning_attn": (
        "q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "cu_seqlens=None"
    ),
    "fla.modules.layernorm.rms_norm": (
        "x, weight, bias, residual=None, eps=1e-05, prenorm=False, residual_in_fp32=False"
    ),
    "fla.modules.layernorm.layer_norm": (
        "x, weight, bias, residual=None, eps=1e-05, prenorm=False, residual_in_fp32=False, is_rms_norm=False"
    ),
    "fla.modules.fused_norm_gate.rms_norm_gated": (
        "x, g, weight, bias, activation='swish', residual=None, prenorm=False, residual_in_fp32=False, eps=1e-06"
    ),
    "fla.modules.fused_norm_gate.layer_norm_gated": (
        "x, g, weight, bias, activation='swish', residual=None, prenorm=False, residual_in_fp32=False, eps=1e-06"
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_package(name):
    module, _, function = name.rpartition(".")
    found = getattr(importlib.import_module(f"ssmkernels.compat.{module}"), function)
    parameters = inspect.signature(found).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == f"({PUBLISHED[name]})"


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_parameter_tells_its_kind(name):
    module, _, function = name.rpartition(".")
    found = getattr(importlib.import_module(f"ssmkernels.compat.{module}"), function)
    assert all(p.annotation is not p.empty for p in inspect.signature(found).parameters.values())
