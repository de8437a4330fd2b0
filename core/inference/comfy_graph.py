"""What a ComfyUI graph draws: {id: {class_type, inputs}}, as it stands in the pictures' `prompt`.

Node packs name their inputs as they like, so nothing here knows a node by its class, but for two
whose meaning is theirs alone. A value is followed from the sampler back through links
[id, output] until a number or a text stands there; what isn't found is None or "".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Inputs = dict[str, Any]

MOST_NODES = 2000
_HOPS = 40                                  # nodes behind one another; a graph may be a circle
# Inputs by which the custom samplers spread out what a KSampler has itself.
_SPREAD = ("sampler", "sigmas", "noise", "guider")
_LATENT = ("latent_image", "latent", "samples")
# Inputs of one text, the most telling first; those of several that are joined.
_TEXT = ("populated_text", "text", "t5xxl", "text_g", "clip_g", "clip_l", "text_l", "prompt",
         "string", "value", "conditioning")
_PART = re.compile(r"(string|text|prompt|conditioning|str|input)_?([a-d]|\d{1,2}|to|from)")
_LORA = re.compile(r"lora(_name)?(_?\d*)")
_STRENGTHS = ("strength_model", "lora_model_strength", "model_weight", "model_str", "lora_wt",
              "lora_weight", "strength", "weight")
# Inputs by which more than texts and LoRAs steers a picture.
_STEERED = ("control_net", "ipadapter", "style_model", "pulid", "instantid")


def drawn(graph: Mapping[str, Any]) -> tuple[Inputs, tuple[str, ...]] | None:
    """What the first sampler was given, under the names that JSON settings have, and what else made
    the picture. None: the graph has no sampler."""
    if len(graph) > MOST_NODES:
        return None
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict)
             and isinstance(node.get("inputs"), dict)}
    return _Graph(nodes).drawn()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Graph:
    def __init__(self, nodes: dict[str, Any]) -> None:
        self.nodes = nodes

    def drawn(self) -> tuple[Inputs, tuple[str, ...]] | None:
        samplers = [(kind, inputs, self.size(inputs)) for node in self.nodes.values()
                    if (inputs := self.spread(node["inputs"]))
                    and {"positive", "conditioning"} & inputs.keys()
                    and {"steps", "sigmas"} & inputs.keys()
                    and (kind := str(node.get("class_type", "")))]
        if not samplers:
            return None
        # Others refine its picture, or a part of it.
        main = next((one for one in samplers if one[2] is not None), samplers[0])
        _, inputs, size = main
        positive = inputs.get("positive", inputs.get("conditioning"))
        guidance = self.along(positive, "guidance", ("conditioning", "positive"))
        beyond = [kind for kind, others, _ in samplers if others is not inputs]
        denoise = self.number(inputs.get("denoise"), ("denoise",))
        if denoise is not None and float(denoise) < 1:
            beyond.append("denoise")
        width, height = size or (None, None)
        loras, clips = self.loras(inputs)
        beyond += [name for name in _STEERED if self.anywhere(name) is not None]
        layer = next((found for name in ("stop_at_clip_layer", "clip_skip") if (
            found := self.number(self.anywhere(name), (name,))) is not None), None)
        return {
            "prompt": self.text(positive, "positive"), "width": width, "height": height,
            "negative_prompt": self.text(inputs.get("negative"), "negative"),
            "seed": self.number(inputs.get("noise_seed", inputs.get("seed")),
                                ("seed", "noise_seed")),
            "steps": self.number(inputs.get("steps"), ("steps",)),
            # of a base with guidance of its own (Flux), that is what counts
            "cfg": self.number(inputs.get("cfg"), ("cfg",)) if guidance is None else guidance,
            "sampler": self.text(inputs.get("sampler_name"), "sampler_name"),
            "scheduler": self.text(inputs.get("scheduler"), "scheduler"), "loras": loras,
            "model": next((name for key in ("ckpt_name", "unet_name", "model_name")
                           if isinstance(name := self.anywhere(key), str)), ""),
            # counted from the end: -2 is a clip skip of 2
            "clip_skip": None if layer is None else -layer,
        }, tuple(dict.fromkeys((*beyond, *clips)))

    # --- following links ---

    def behind(self, link: Any) -> Inputs:
        """The inputs of the node that a link names; none where it is no link."""
        match link:
            case [key, *_] if str(key) in self.nodes:
                inputs: Inputs = self.nodes[str(key)]["inputs"]
                return inputs
        return {}

    def spread(self, inputs: Inputs, hops: int = 4) -> Inputs:
        """A sampler's inputs, and those of the nodes that stand for some of them."""
        more: Inputs = {}
        for name in _SPREAD if hops else ():
            more |= self.spread(self.behind(inputs.get(name)), hops - 1)
        return more | inputs

    def anywhere(self, key: str) -> Any:
        return next((node["inputs"][key] for node in self.nodes.values()
                     if key in node["inputs"]), None)

    def chain(self, link: Any, through: tuple[str, ...]) -> Iterator[Inputs]:
        """Nodes one behind the other, by the first of the inputs `through` that is a link; of a
        node with one link alone, such as a reroute, by that."""
        for _ in range(_HOPS):
            inputs = self.behind(link)
            if not inputs:
                return
            yield inputs
            links = [value for value in inputs.values() if isinstance(value, list)]
            link = next((inputs[name] for name in through if isinstance(inputs.get(name), list)),
                        links[0] if len(links) == 1 else None)

    def number(self, value: Any, names: tuple[str, ...]) -> Any:
        """A number, or that of the node where a link ends, under one of `names` or alone."""
        for _ in range(_HOPS):
            if _is_number(value):
                return value
            inputs = self.behind(value)
            named = [inputs[name] for name in (*names, "value", "int", "float", "number")
                     if name in inputs]
            alone = [one for one in inputs.values() if _is_number(one) or self.behind(one)]
            value = named[0] if named else alone[0] if len(alone) == 1 else None
        return None

    def along(self, link: Any, name: str, through: tuple[str, ...]) -> Any:
        """The number `name` of the first node of a chain that has it."""
        return next((self.number(inputs[name], (name,)) for inputs in self.chain(link, through)
                     if name in inputs), None)

    def size(self, inputs: Inputs) -> tuple[Any, Any] | None:
        """Width and height of a sampler's empty latent; None where it goes on from a picture."""
        link = next((inputs[name] for name in _LATENT if name in inputs), None)
        for node in self.chain(link, _LATENT):
            if "steps" in node or "sigmas" in node:
                return None
            for prefix in ("", "empty_latent_"):
                if f"{prefix}width" in node:
                    width, height = (self.number(node.get(prefix + side), (side,))
                                     for side in ("width", "height"))
                    return width, height
        return None

    # --- texts ---

    def text(self, value: Any, side: str, hops: int = _HOPS) -> str:
        """The text that a value is, or that the nodes behind it make. `side`: positive | negative,
        for nodes that hold both."""
        if isinstance(value, str):
            return value
        inputs = self.behind(value)
        if not inputs or not hops:
            return ""
        kind = str(self.nodes[str(value[0])].get("class_type", ""))
        if kind == "ConditioningZeroOut":
            return ""
        if parts := [name for name in inputs if _PART.fullmatch(name)]:
            # a switch hands one of its inputs on
            chosen = inputs.get("select", inputs.get("index"))
            wanted = [name for name in parts if name.endswith(str(chosen))] or parts
            texts = [text for name in wanted if (text := self.text(inputs[name], side, hops - 1))]
            usual = " BREAK " if kind == "ConditioningConcat" else ", "
            joint = inputs.get("delimiter", inputs.get("separator", usual))
            return str(joint).replace("\\n", "\n").join(texts)
        names = [side, f"text_{side}", f"{side}_prompt", *_TEXT]
        texts = [text for name in names if name in inputs
                 and (text := self.text(inputs[name], side, hops - 1))]
        # SDXL's two encoders may be told different things
        if "text_g" in inputs and "text_l" in inputs:
            return ", ".join(dict.fromkeys(texts))
        if texts:
            return texts[0]
        alone = [one for key, one in inputs.items() if isinstance(one, list) or (
            isinstance(one, str) and not key.endswith(("_name", "image")))]
        return self.text(alone[0], side, hops - 1) if len(alone) == 1 else ""

    # --- LoRAs ---

    def loras(self, main: Inputs) -> tuple[list[tuple[str, float]], list[str]]:
        """The LoRAs before a sampler, and the names of weights for text encoders alone."""
        models = [*self.chain(main.get("model"), ("model", "MODEL"))]
        stacks = [node for inputs in models
                  for node in self.chain(inputs.get("lora_stack"), ("lora_stack",))]
        # a loader of stacks alone leads into its stack by both ways
        nodes = {id(node): node for node in (*models, *stacks)}.values()
        found = [pair for node in nodes for pair in [*self.loras_in(node)][::-1]]
        clips = ["strength_clip" for node in nodes
                 if node.get("strength_clip", node.get("strength_model"))
                 != node.get("strength_model")]
        # the walk goes from the sampler back to the base
        return found[::-1], clips

    def loras_in(self, inputs: Inputs) -> Iterator[tuple[str, float]]:
        for key, value in inputs.items():
            rows = value.get("__value__") if isinstance(value, dict) else None
            for row in rows if isinstance(rows, list) else [value]:
                match row:
                    case {"lora": str(name)} | {"name": str(name)}:
                        strength = row.get("strength")
                        on = row.get("on", row.get("active", True))
                    case str(name) if (named := _LORA.fullmatch(key)) and name != "None":
                        strength = next((inputs[one + named[2]] for one in _STRENGTHS
                                         if one + named[2] in inputs), None)
                        on = str(inputs.get(f"switch{named[2]}", "On")).lower() in ("on", "true")
                    case _:
                        continue
                weight = self.number(strength, ("strength", *_STRENGTHS))
                if on and weight is not None:
                    yield name, float(weight)
