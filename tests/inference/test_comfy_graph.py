"""ComfyUI's graphs: what the first sampler was given, through nodes of packs, links, reroutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.inference.png_info import parse_comfy


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(**changes: Any) -> dict[str, Any]:
    """ComfyUI's own first workflow, with other nodes; _3 is the node "3"."""
    nodes = {
        "3": node("KSampler", seed=5, steps=20, cfg=8.0, sampler_name="euler", scheduler="normal",
                  denoise=1.0, model=["4", 0], positive=["6", 0], negative=["7", 0],
                  latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="x.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="bad", clip=["4", 1])}
    return nodes | {key.removeprefix("_").replace("__", ":"): one for key, one in changes.items()}


def sampler(**inputs: Any) -> dict[str, Any]:
    return node("KSampler", **graph()["3"]["inputs"] | inputs)


FLUX = {
    "6": node("CLIPTextEncode", text="a cat", clip=["11", 0]),
    "13": node("SamplerCustomAdvanced", noise=["25", 0], guider=["22", 0], sampler=["16", 0],
               sigmas=["17", 0], latent_image=["27", 0]),
    "16": node("KSamplerSelect", sampler_name="euler"),
    "17": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0, model=["30", 0]),
    "22": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
    "25": node("RandomNoise", noise_seed=77),
    "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
    "27": node("EmptySD3LatentImage", width=["34", 0], height=["35", 0], batch_size=1),
    "34": node("PrimitiveNode", value=1024), "35": node("easy int", value=["36", 0]),
    "36": node("Reroute", **{"": ["34", 0]}),
    "30": node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=["34", 0],
               height=["35", 0], model=["31", 0]),
    "31": node("LoraLoaderModelOnly", lora_name="f/ink.safetensors", strength_model=0.9,
               model=["12", 0]),
    "12": node("UNETLoader", unet_name="flux1-dev.safetensors")}
EFFICIENT = {
    "1": node("Efficient Loader", ckpt_name="x.safetensors", positive="a cat", negative="bad",
              empty_latent_width=512, empty_latent_height=768, lora_stack=["9", 0], clip_skip=-2,
              lora_name="own.safetensors", lora_model_strength=0.6, lora_clip_strength=0.6),
    "2": node("KSampler (Efficient)", seed=5, steps=20, cfg=8.0, sampler_name="euler",
              scheduler="normal", denoise=1.0, model=["1", 0], positive=["1", 1],
              negative=["1", 2], latent_image=["1", 3]),
    "9": node("LoRA Stacker", lora_name_1="a.safetensors", lora_wt_1=0.5, lora_name_2="None",
              lora_wt_2=1.0, switch_3="Off", lora_name_3="c.safetensors", model_weight_3=1.0)}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "its own": (graph(), {}),
    "Flux": (FLUX, {"prompt": "a cat <lora:ink:0.9>", "negative": "", "seed": 77, "cfg": 3.5,
                    "size": "1024,1024", "model": "flux1-dev.safetensors"}),
    "SamplerCustom": (graph(_3=node(
        "SamplerCustom", model=["4", 0], add_noise=True, noise_seed=5, cfg=8.0, positive=["6", 0],
        negative=["7", 0], sampler=["16", 0], sigmas=["18", 0], latent_image=["5", 0]),
        _16=node("KSamplerSelect", sampler_name="euler"),
        _18=node("SplitSigmas", sigmas=["17", 0], step=3),
        _17=node("KarrasScheduler", steps=20, sigma_max=14.6, sigma_min=0.03, rho=7.0)), {}),
    "KSamplerAdvanced": (graph(_3=node(
        "KSamplerAdvanced", **{k: v for k, v in graph()["3"]["inputs"].items() if k != "seed"},
        noise_seed=5, start_at_step=0)), {}),
    "efficiency nodes": (EFFICIENT, {"prompt": "a cat <lora:a:0.5> <lora:own:0.6>",
                                    "clip_skip": 2}),
    "a seed node": (graph(_3=sampler(seed=["31", 0]),
                          _31=node("Seed (rgthree)", seed=4242)), {"seed": 4242}),
    "a seed that nobody knows": (graph(_3=sampler(seed=["31", 0]), _31=node(
        "Math", a=3, b=4, op="a*b")), {"seed": None}),
    "a primitive": (graph(_3=sampler(steps=["31", 0], cfg=["32", 0]),
                          _31=node("PrimitiveInt", value=20), _32=node("Float", Number="8.0",
                                                                       value=8.0)), {}),
    "joined texts": (graph(_6=node("CLIPTextEncode", text=["30", 0], clip=["4", 1]), _30=node(
        "StringConcatenate", string_a="a red", string_b=["33", 0], delimiter=" "),
        _33=node("PrimitiveStringMultiline", value="cat")), {"prompt": "a red cat"}),
    "SDXL": (graph(_6=node("CLIPTextEncodeSDXL", text_g="a cat", text_l="a cat", width=1024,
                           height=1024, clip=["4", 1])), {}),
    "SDXL, two texts": (graph(_6=node("CLIPTextEncodeSDXL", text_g="a cat", text_l="fur",
                                      clip=["4", 1])), {"prompt": "a cat, fur"}),
    "SD3": (graph(_6=node("CLIPTextEncodeSD3", clip_l="a cat", clip_g="a cat", t5xxl="",
                          empty_padding="none", clip=["4", 1])), {}),
    "Flux' two texts": (graph(_6=node("CLIPTextEncodeFlux", clip_l="cat", t5xxl="a cat",
                                      guidance=3.0, clip=["4", 1])), {"cfg": 3.0}),
    "no negative": (graph(_7=node("ConditioningZeroOut", conditioning=["6", 0])),
                    {"negative": ""}),
    "ControlNet": (graph(_3=sampler(positive=["9", 0], negative=["9", 1]), _9=node(
        "ControlNetApplyAdvanced", strength=1.0, positive=["6", 0], negative=["7", 0],
        control_net=["8", 0], image=["2", 0])), {"beyond": ("control_net",)}),
    "two conditionings": (graph(_3=sampler(positive=["9", 0]), _9=node(
        "ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["10", 0]),
        _10=node("CLIPTextEncode", text="a hat", clip=["4", 1])),
        {"prompt": "a cat BREAK a hat"}),
    "a wildcard's outcome": (graph(_6=node("CLIPTextEncode", text=["8", 0], clip=["4", 1]), _8=node(
        "ImpactWildcardProcessor", wildcard_text="a __x__", populated_text="a cat", mode="fixed",
        seed=1)), {}),
    "a switch": (graph(_6=node("CLIPTextEncode", text=["8", 0], clip=["4", 1]), _8=node(
        "ImpactSwitch", select=2, input1=["9", 0], input2=["10", 0]),
        _9=node("Text", text="a dog"), _10=node("Text", text="a cat")), {}),
    "rgthree's LoRAs": (graph(_3=sampler(model=["10", 0]), _10=node(
        "Power Lora Loader (rgthree)", PowerLoraLoaderHeaderWidget={"type": "x"},
        lora_1={"on": True, "lora": "ink.safetensors", "strength": 0.7},
        lora_2={"on": False, "lora": "off.safetensors", "strength": 1}, model=["4", 0])),
        {"prompt": "a cat <lora:ink:0.7>"}),
    "the LoRA manager's": (graph(_3=sampler(model=["10", 0]), _10=node(
        "Lora Loader (LoraManager)", text="<lora:ink:0.7>", model=["4", 0], loras={"__value__": [
            {"name": "ink", "strength": 0.7, "active": True},
            {"name": "no", "strength": 1, "active": False}]})), {"prompt": "a cat <lora:ink:0.7>"}),
    "LoRAs in a row": (graph(
        _3=sampler(model=["11", 0]), _11=node("LoraLoader", lora_name="b.safetensors",
                                              strength_model=-0.5, strength_clip=-0.5,
                                              model=["12", 0]),
        _12=node("Reroute", **{"": ["10", 0]}), _10=node(
            "LoraLoader", lora_name="x\\a.safetensors", strength_model=["13", 0], model=["4", 0]),
        _13=node("Float", value=0.3)), {"prompt": "a cat <lora:a:0.3> <lora:b:-0.5>"}),
    "a second pass, first in the file": ({"1": node(
        "KSampler", **graph()["3"]["inputs"] | {"latent_image": ["2", 0], "seed": 9,
                                                "denoise": 0.5}),
        "2": node("LatentUpscaleBy", scale_by=1.5, samples=["3", 0])} | graph(),
        {"beyond": ("KSampler",)}),
    "a face's pass": (graph(_20=node(
        "FaceDetailer", seed=1, steps=9, cfg=2.0, sampler_name="ddim", scheduler="normal",
        denoise=0.4, image=["8", 0], model=["4", 0], positive=["6", 0], negative=["7", 0])),
        {"beyond": ("FaceDetailer",)}),
    "from a picture": (graph(_5=node("VAEEncode", pixels=["8", 0], vae=["4", 2]),
                             _3=sampler(denoise=0.6), _8=node("LoadImage", image="a.png")),
                       {"size": "", "beyond": ("denoise",)}),
    "a subgraph's": ({f"57:{key}": node(one["class_type"], **{
        name: [f"57:{value[0]}", value[1]] if isinstance(value, list) else value
        for name, value in one["inputs"].items()}) for key, one in graph().items()}, {}),
    "clip skip": (graph(_9=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1])),
                  {"clip_skip": 2}),
}
USUAL = {"prompt": "a cat", "negative": "bad", "seed": 5, "steps": 20, "cfg": 8.0,
         "size": "512,768", "sampler": "euler", "model": "x.safetensors", "clip_skip": None,
         "beyond": ()}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_tells(name: str) -> None:
    nodes, told = CASES[name]
    found = parse_comfy(nodes, Path("x.png"))
    expected = USUAL | told
    assert {key: getattr(found, key) for key in expected} == expected
    assert [*found.not_told] == [key for key in ("seed", "size") if expected[key] in (None, "")]
