"""What all scripts share: files that are whole or not there, results that say where they come from, errors of one line.

    write_whole, lock_folder, Checkpoint    a killed run leaves nothing half written, and goes on with --resume
    save_result, format_table  a result is JSON with device, versions, model, seed and command; tables are Markdown
    Parser, command_line, pick_device       bad input, raised anywhere as ValueError or OSError, is one line and exit code 2
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

BEGAN = time.time()  # when the process began, for the seconds in results


# ----------------------------------------------------------------------------------------------------------
# Files

NO_MEMORY = "can't allocate memory"  # what PyTorch says of a CPU's, in a RuntimeError
ELSEWHERE = "choose another folder (--out, --results, or XDG_CACHE_HOME for the cache)"


def make_folder(path):
    """Make a folder that can be written, unless it is there; returns its Path. OSError names it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
    except OSError as e:
        raise OSError(f"cannot write into {path} ({e.strerror}); {ELSEWHERE}") from None
    return Path(path)


def lock_folder(path):
    """Make a folder and keep other runs out of it while this process lives, however it ends. ValueError when one is in it already."""
    folder = make_folder(path)
    try:
        import fcntl

        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing into {folder}; wait for it, or give another folder with --out") from None
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    for part in folder.glob("*.*.part"):  # of a run of ours that was killed while it wrote
        if re.fullmatch(r".+\.(safetensors|begun|jsonl?|png)\.\d+\.part", part.name):
            part.unlink(missing_ok=True)
    return folder


def write_whole(path, data):
    """Write bytes to a file so that it is there whole or not at all, even through a crash."""
    path = make_folder(Path(path).parent) / Path(path).name
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise OSError(f"cannot write {path} ({e.strerror}); free some space there, or {ELSEWHERE}") from None
    finally:
        part.unlink(missing_ok=True)


def lacks_memory(e):
    """Whether an error says that a GPU's memory is full: PyTorch's, CUDA's, cuBLAS's or Triton's, or one of a compiler or a capture that
    followed it."""
    if e is None:
        return False
    full = isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e) or "CUBLAS_STATUS_ALLOC_FAILED" in str(e)
    return full or lacks_memory(e.__cause__ or e.__context__)


def reason(e):
    """An exception in one line; a KeyError, which says its key alone, as what is not there."""
    return f"no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]


@contextlib.contextmanager
def refusing(path, what, remedy):
    """Whatever goes wrong inside over what a file holds becomes a ValueError of one line: path, what it is not, why, the remedy."""
    try:
        yield
    except Exception as e:  # whatever a damaged file leads to
        if isinstance(e, MemoryError) or NO_MEMORY in str(e) or lacks_memory(e):  # not the file's fault
            raise
        raise ValueError(f"{path} {what} ({reason(e)}); {remedy}") from None


def write_safetensors(path, tensors, **meta):
    """Write {name: tensor} whole or not at all, with JSON under the key "dash": one key, since the order of several is not fixed."""
    write_whole(path, save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"dash": json.dumps(meta)}))


@contextlib.contextmanager
def open_safetensors(path, maker="python train.py"):
    """What `write_safetensors` wrote, open: (file, meta). Errors, of what is read from it too, name the path and the command that makes it."""
    if not Path(path).is_file():
        what = "a folder: give the file in it, or" if Path(path).is_dir() else "missing or not a file;"
        raise FileNotFoundError(f"{path} is {what} make it with {maker}")
    open(path, "rb").close()  # may not be read: says so itself
    with refusing(path, "is damaged or not ours", f"give another file, or move it away and make it anew with {maker}"), safe_open(path, "pt") as f:
        meta = json.loads((f.metadata() or {})["dash"])
        if not isinstance(meta, dict):
            raise ValueError("no settings")
        yield f, meta


def read_safetensors(path, maker="python train.py"):
    """What `write_safetensors` wrote -> (tensors, meta). Errors as `open_safetensors`."""
    with open_safetensors(path, maker) as (f, meta):
        return {k: f.get_tensor(k) for k in f.keys()}, meta


def sha256(path):
    """A file -> its SHA-256, 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path):
    """A JSON file -> a dict. ValueError or FileNotFoundError names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; give a folder that has it, or make it anew") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no JSON ({reason(e)}); mend it, or get it anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; mend it, or get it anew")
    return value


class Checkpoint:
    """Everything that the rest of a run depends on, in one safetensors file; written whole, no pickle.

    An older run's file stays until the first checkpoint of a new one takes its place; until then a file besides, with the new run's
    settings, tells --resume that it is not to go on from there.
    """

    def __init__(self, path, settings, seed, resume):
        self.path = Path(path)
        self.begun = self.path.with_suffix(".begun")
        self.settings = dict(settings)
        self.seed = seed
        self.meta = {"step": 0}
        if not resume:
            write_whole(self.begun, json.dumps(settings).encode())
        elif not self.path.exists() or (self.begun.exists() and read_json(self.begun) == settings):
            print(f"--resume: this run has left no {path} yet, so what it would hold starts anew", file=sys.stderr)
        else:
            with open_safetensors(path) as (_, meta):
                self.meta = meta
            was = self.meta.get("settings")
            if type(self.meta.get("step")) is not int or not isinstance(was, dict):
                raise ValueError(f"{path} is no checkpoint; move it away, or start anew without --resume")
            if was != settings:
                other = {k: was.get(k) for k in sorted(was.keys() | settings.keys()) if was.get(k) != settings.get(k)}
                raise ValueError(f"{path} belongs to a run with other settings ({other}); repeat them, or start anew without --resume")

    @functools.cached_property
    def tensors(self):
        """What `write` was given last; read where it is needed, as it may be gigabytes."""
        return read_safetensors(self.path)[0]

    def write(self, step, tensors, **more):
        write_safetensors(self.path, tensors, step=step, settings=self.settings, **more)
        self.begun.unlink(missing_ok=True)

    def log(self, path):
        """The log of this run, open, without the lines that a killed run wrote after its checkpoint."""
        kept = []
        if self.meta["step"]:
            with refusing(path, "does not go with its checkpoint", "start anew without --resume"):
                kept = path.read_text(encoding="utf-8").splitlines()[: self.meta["step"]]
                if [json.loads(line)["step"] for line in kept] != list(range(self.meta["step"])):
                    raise ValueError("it lacks steps")
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        return open(path, "a", buffering=1)  # a line is out as soon as it is written

    def steps(self, what, total, every, parameters, optimizer, generator, more=lambda: {}):
        """The steps of a training that are left: yields (step, progress bar). Puts parameters, {name: tensor} that the optimizer trains,
        optimizer and generator back before the first; writes them, and what `more` returns, after every so many and after the last."""
        start = self.meta["step"]
        if start:
            for name, p in parameters.items():
                p.data.copy_(self.tensors[name])
                adam = {k.removeprefix(f"adam.{name}."): v for k, v in self.tensors.items() if k.startswith(f"adam.{name}.")}
                optimizer.state[p] = {k: v.to(p.device if v.dim() else "cpu") for k, v in adam.items()}
            generator.set_state(self.tensors["generator"])
        bar = tqdm(range(start, total), desc=what, initial=start, total=total)
        for step in bar:
            yield step, bar
            if (step + 1) % every == 0 or step + 1 == total:
                adam = {f"adam.{name}.{k}": v for name, p in parameters.items() for k, v in optimizer.state[p].items()}
                self.write(step + 1, parameters | adam | {"generator": generator.get_state()}, **more())


def descend(loss, optimizer, parameters):
    """One step of an optimizer down a loss, the gradient clipped to a norm of 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


# ----------------------------------------------------------------------------------------------------------
# Results


def format_table(header, rows):
    """Lists of cells -> a Markdown table whose columns line up in a terminal too."""
    widths = [max(len(str(row[n])) for row in [header, *rows]) for n in range(len(header))]
    line = lambda row: "| " + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths)) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def by(rows, key):
    """rows in groups of the same key: {value: [row]}, in order."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def save_result(path, model, seed, **content):
    """Write a result as JSON with what it takes to read it again: device, versions, model and its weights, seed, command."""
    versions = {}
    for name in ("transformers", "llama-cpp-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    about = {"seconds": round(time.time() - BEGAN), "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "seed": seed,
             "device": device_name(model.device), "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
             "versions": versions, "model": model.name, "weights": model.weights, "fingerprint": model.fingerprint(),
             "int4": getattr(model, "int4", None)}
    write_whole(path, (json.dumps(about | content, indent=1) + "\n").encode())


def device_name(device):
    """What a reader of a number wants to know of the device: its name, and for a CPU the machine's cores and their vector unit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


# ----------------------------------------------------------------------------------------------------------
# The command line


def seed(text):
    """What --seed takes: 0 to 2^32 - 1."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: give 0 to {2**32 - 1}")
    return int(text)


def folder(text):
    """What --data-dir takes: a folder that is there, or nothing (which `Parser` refuses)."""
    if text and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder; give one that is there")
    return text


def count(text):
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line, not the usage text."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--model", default="smollm2", help="smollm2 (the default), a folder in Hugging Face layout, or a hub id")
        self.add_argument("--seed", type=seed, default=0, help="of all that is drawn at random (%(default)s)")
        self.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")

    def parse_args(self):
        args = super().parse_args()
        for name, given in vars(args).items():
            option = f"--{name.replace('_', '-')}"
            for value in given if isinstance(given, list) else [given]:
                if value == "" and name != "prompt":  # as a script passes what it did not set
                    self.error(f"{option} is empty; give it a value, or leave it out")
                if isinstance(value, int) and value > 2**32:
                    self.error(f"{option} {value}: give a smaller number")
                try:
                    str(value).encode()
                except UnicodeEncodeError as e:
                    self.error(f"{option} is no UTF-8 text (character {e.start}); convert or rename it first")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def command_line(main):
    """Run a script's main: bad input, raised as ValueError or OSError, becomes one line on stderr and exit code 2."""
    if sys.stderr is None:  # closed; progress bars want one
        sys.stderr = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    try:
        main()
        print(end="", flush=True)  # a pipe that nobody reads any more shows itself here, not when Python ends
        return
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as the shell says of a program that SIGPIPE ends
    except (ValueError, OSError) as e:
        why = " ".join(str(e).split())
        if getattr(e, "errno", None) == errno.ENOSPC and not e.filename:
            why += "; free some space where the output goes"
        elif getattr(e, "filename", None):  # raised by the system, not by us
            why = f"{e.filename}: {e.strerror}; give another path, or make this one usable"
    except (MemoryError, RuntimeError) as e:
        if lacks_memory(e):
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            why = (f"the {size / 1e9:.0f} GB of the GPU's memory are full; give a smaller --model, --limit or --samples, a shorter --prompt, "
                   "or --device cpu")
        elif isinstance(e, MemoryError) or NO_MEMORY in str(e):
            why = "this machine's memory is full; give a smaller --model, --limit, --samples or --max-new-tokens, or a shorter --prompt"
        else:
            raise
    except KeyboardInterrupt:
        why = "interrupted"
        if Path(sys.argv[0]).name == "train.py":
            why += "; --resume goes on from what it had written"
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """ "auto", "cpu", "cuda", ... -> torch.device. ValueError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; give auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: not served; give auto, cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: PyTorch finds no such CUDA device here; use --device cpu")
        torch.cuda.set_device(device.index or 0)  # streams and graphs are made on the current device
    return device
