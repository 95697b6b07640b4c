"""Loads a folder as remote code and generates, in a process of its own whose audit hook sees what that does.

Run as text by `tests.fixtures.children.run_clean`, where this package does not exist: it prints facts.
"""

import json
import pathlib
import pickle
import socket
import subprocess
import sys
import sysconfig

import peft  # noqa: F401 (the checkpoint has an adapter)
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

FOLDER, HOME = sys.argv[1:]
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
INSTALLED += (str(pathlib.Path(transformers.__file__).parents[1]), str(pathlib.Path(torch.__file__).parents[1]))
CACHE = str(pathlib.Path(HOME, "modules"))
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
seen = {"code": [], "foreign": [], "written": [], "processes": [], "sockets": [], "unpickled": []}


def is_installed(path):
    return path.startswith((*INSTALLED, "<frozen")) and not path.startswith((CACHE, FOLDER))


def hook(event, arguments):
    if event == "exec":
        file = arguments[0].co_filename
        if file.startswith((CACHE, FOLDER)):
            seen["code"].append(file)
        elif not is_installed(file):
            # Text that a library runs, as `dataclasses` does: who asked for it?
            caller = sys._getframe(1).f_code.co_filename
            if not is_installed(caller):
                seen["foreign"].append(f"{file} by {caller}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, str) and isinstance(flags, int) and flags & 3:
            seen["written"].append(path)
    elif event in CHANGES:
        seen["written"].append(str(arguments[0]))
    elif event in PROCESSES:
        seen["processes"].append(event)
    elif event.startswith("socket."):
        seen["sockets"].append(f"{event} {arguments[1:]}")
    elif event == "pickle.find_class":
        seen["unpickled"].append(".".join(map(str, arguments)))


sys.addaudithook(hook)
remote = {"trust_remote_code": True}
AutoConfig.from_pretrained(FOLDER, **remote)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **remote)
model = AutoModelForCausalLM.from_pretrained(FOLDER, **remote).eval()
AutoModel.from_pretrained(FOLDER, **remote)
text = "the cat sat on the mat and the dog ran to the man " * 6
encoding = tokenizer(text, return_tensors="pt", return_span_ids=True, return_protected_mask=True)
outputs = model.generate(**encoding, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
model.generate(**encoding, max_new_tokens=2, num_beams=2, target_ratio=4.0)
facts = {name: sorted(set(values)) for name, values in seen.items()}
facts["merged"] = outputs.past_key_values.slot_lengths.shape[1] < outputs.sequences.shape[1]

# Would the hook have seen it?
seen.update({name: [] for name in seen})
code = "exec('1'); open(file, 'w'); subprocess.run(['true']); socket.socket(); pickle.loads(data)"
names = {"subprocess": subprocess, "socket": socket, "pickle": pickle, "file": str(pathlib.Path(HOME, "control"))}
names["data"] = pickle.dumps(pathlib.PurePosixPath("x"))
exec(compile(code, str(pathlib.Path(FOLDER, "control.py")), "exec"), names)
facts["control"] = sorted(name for name, values in seen.items() if values)
print("FACTS" + json.dumps(facts))
