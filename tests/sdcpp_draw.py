"""Draws with stable-diffusion.cpp what a job asks for. Run by lora_files/test_interop.py in a
Python of its own (3.12 or newer, with `inferna`); imports nothing of ours.

    python sdcpp_draw.py job.json -> job.npz (shot number -> (H, W, 3) uint8), job.log.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from inferna.sd import stable_diffusion as sd


def main(path: Path) -> None:
    job, log, pictures = json.loads(path.read_text("utf-8")), [], {}
    sd.set_log_callback(lambda level, text: log.append([int(level), text.strip()]))
    params = sd.SDContextParams()
    params.model_path, params.n_threads = job["model"], job["threads"]
    params.rng_type = sd.RngType.CPU                     # torch's Mersenne twister
    context = None
    for number, shot in enumerate(job["shots"]):
        mode = int(sd.LoraApplyMode[shot["mode"]])
        if context is None or params.lora_apply_mode != mode:
            params.lora_apply_mode, context = mode, None    # the one before leaves memory first
            try:
                context = sd.SDContext(params)
            except RuntimeError as error:
                raise SystemExit(f"{error}\n{log[-20:]}") from None
        asked = sd.SDImageGenParams(
            prompt=job["prompt"], negative_prompt="", width=job["size"], height=job["size"],
            seed=job["seed"], sample_steps=len(job["sigmas"]) - 1, cfg_scale=1.0,
            sample_method=sd.SampleMethod.EULER)
        asked.sample_params.custom_sigmas = job["sigmas"]
        asked.set_loras([{"path": one, "multiplier": weight} for one, weight in shot["loras"]])
        log.append([-1, str(number)])
        pictures[str(number)] = context.generate_with_params(asked)[0].to_numpy()
    np.savez(path.with_suffix(".npz"), **pictures)
    path.with_suffix(".log.json").write_text(json.dumps(
        {"family": context.get_model_version_name(), "lines": log}), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
