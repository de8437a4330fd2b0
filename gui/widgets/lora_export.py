"""Taking a LoRA to other programs: which file, which program, which folder."""

from __future__ import annotations

from core.lora_files.export import PROGRAMS
from gui.html import details, esc, option, small
from gui.state import inference_request as request
from gui.state.app_state import Context, Snapshot
from gui.state.inference_files import InferenceFiles
from gui.widgets.lora_list import title_of

LABELS = {"a1111": "A1111", "forge": "Forge", "comfyui": "ComfyUI", "diffusers": "diffusers"}


def lora_export(ctx: Context, snap: Snapshot, files: InferenceFiles) -> str:
    """Folded; the folder is the one used last, or where the program was found."""
    tr = ctx.tr
    choices = request.lora_choices(snap, files)
    loras = request.added(snap, choices)
    if not loras:
        return ""
    titles = {choice.file: title_of(ctx, choice) for choice in choices}
    lora_options = "".join(option(lora.file, titles.get(lora.file, lora.name)) for lora in loras)
    folders, places = {program: snap.settings.exports.get(program, "") for program in PROGRAMS}, ""
    for place in files.places or ():
        folders[place.program] = folders[place.program] or str(place.folder)
        places += option(str(place.folder), LABELS[place.program])
    first = next((program for program in PROGRAMS if folders[program]), "a1111")
    # The page's script puts the folder of the chosen program into the box.
    programs = "".join(option(program, LABELS[program], program == first,
                              f' data-folder="{esc(folders[program])}"') for program in PROGRAMS)
    form = (f'<form data-act="export" data-fields>'
            f'<label>LoRA <select name="file">{lora_options}</select></label>'
            f'<label>{esc(tr("tab_inference.program"))} <select name="program" data-folders>'
            f'{programs}</select></label>'
            f'<label class="wide">{esc(tr("tab_inference.folder"))} '
            f'<input type="text" name="folder" list="lora-places" value="{esc(folders[first])}" '
            f'autocomplete="off" spellcheck="false" '
            f'placeholder="{esc(tr("tab_inference.folder_hint"))}">'
            f'</label><datalist id="lora-places">{places}</datalist>'
            f'<button class="act">{esc(tr("tab_inference.do_export"))}</button></form>')
    return details(tr("tab_inference.export"), form + small(tr("tab_inference.export_help"))
                   + small(files.message, status=True), "box export", "export")
