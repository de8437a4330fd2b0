"""The layers that a LoRA is put on, as suffixes of diffusers' module names."""

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")   # of CLIP
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
ATTENTION_ALIASES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0",
                     "o_proj": "to_out.0", "to_out": "to_out.0"}
ALIASES = ATTENTION_ALIASES | {"fc1": "ff.net.0.proj", "fc2": "ff.net.2"}
UNET_PRESETS = {"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out")}
# Two streams, for pictures and for text, that attend to each other (SD 3 and its heirs).
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
JOINT_FF = (*FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2")
