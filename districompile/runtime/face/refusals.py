# SPDX-License-Identifier: Apache-2.0
"""Methods of diffusers' models that a converted module refuses, with what to do instead."""

from __future__ import annotations

from districompile.runtime.face.placeholders import LAYERS_ADVICE

_LORA = (
    "LoRA weights are added to a bundle by `districompile refit BUNDLE --lora FILE --scale 1.0`, and the result is "
    "loaded instead; `districompile.enable(pipe)` takes LoRAs by name"
)
_ATTENTION = "attention is compiled in and memory-efficient already: leave this call out"
_MEMORY = "engines manage their memory: leave this call out, or exclude this component from it"
_CACHES = "the displaced steps of a converted module are its cache: leave this call out"
_TRAINING = "a converted module computes no gradients: train the original module"
_PIPELINE = "save and load the bundle folder itself, with `districompile.load`"

_GROUPS: dict[str, tuple[str, ...]] = {
    _LORA: (
        "load_lora_adapter", "load_lora_weights", "save_lora_adapter", "fuse_lora", "unfuse_lora", "unload_lora",
        "set_adapters", "add_adapter", "set_adapter", "disable_adapters", "enable_adapters", "active_adapters",
        "disable_lora", "enable_lora", "delete_adapters", "enable_lora_hotswap", "load_attn_procs", "save_attn_procs",
    ),
    LAYERS_ADVICE: (
        "_load_ip_adapter_weights", "_load_ip_adapter_loras", "load_ip_adapter", "set_attn_processor",
        "set_default_attn_processor", "fuse_qkv_projections", "enable_freeu", "disable_freeu", "load_motion_modules",
        "save_motion_modules", "freeze_unet2d_params", "enable_layerwise_casting", "dequantize", "register_to_config",
        "enable_forward_chunking",
    ),
    _ATTENTION: ("enable_xformers_memory_efficient_attention", "set_attention_backend", "enable_npu_flash_attention",
                 "enable_xla_flash_attention"),
    _MEMORY: ("enable_parallelism", "reset_device_map"),
    _CACHES: ("enable_cache",),
    _TRAINING: ("enable_gradient_checkpointing",),
    _PIPELINE: ("save_pretrained", "save_config", "push_to_hub", "from_pretrained", "from_config"),
}  # fmt: skip

# Refused when the attribute is looked up: `hasattr` is false.
ABSENT: dict[str, str] = {name: advice for advice, names in _GROUPS.items() for name in names}

# Refused when they are called: libraries skip a model without these methods, and would ignore the setting silently.
# The value is the first argument that switches the feature off, which is accepted.
SWITCHES: dict[str, tuple[str, object]] = {
    "set_attention_slice": (_ATTENTION, None),
    "set_use_memory_efficient_attention_xformers": (_ATTENTION, False),
    "set_use_npu_flash_attention": (_ATTENTION, False),
    "set_use_xla_flash_attention": (_ATTENTION, False),
    "enable_group_offload": (_MEMORY, ...),
}

# Methods that switch off features without effect on results. A converted module has none of these features.
NOTHING_TO_DO = frozenset(
    {
        "disable_xformers_memory_efficient_attention", "disable_npu_flash_attention", "disable_xla_flash_attention",
        "disable_gradient_checkpointing", "unfuse_qkv_projections", "reset_attention_backend", "disable_cache",
        "disable_forward_chunking",
    }
)  # fmt: skip
