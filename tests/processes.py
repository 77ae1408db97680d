"""Runs of the trainer in processes of their own, which meet their end where a test wants them to.

Importing torch takes longer than most of these runs. So it is done once, in a server that forks
each run (multiprocessing's "forkserver"). What is forked gets real signals and writes real files.
"""

import importlib
import multiprocessing
import os
import pkgutil
import re
import resource
import runpy
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

# torch._dynamo takes as long to import as torch itself, and the first optimiser does so.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "torch.distributed.run", "filelock"])

# torchrun's options for two processes
TWO_PROCESSES = ["--standalone", "--nproc_per_node=2"]


class Run:
    """A process that runs the program with these flags, in the current folder.

    What is in `prepare`, usually traps, is called before the program begins. `torchrun` is a list
    of torchrun's options: the process is then torchrun itself, and what it starts is the program.
    With `script` the file runs to its very end, as Python runs a script, instead of main() only.
    `env` holds more environment variables. All arguments are pickled, so functions must come from
    a module that is cheap to import.
    """

    def __init__(self, flags, prepare=(), torchrun=None, script=False, env=None):
        reader, writer = FORKS.Pipe(duplex=False)
        program = (flags, list(prepare), script)
        args = (writer, torchrun, env or {}, program)
        self.process = FORKS.Process(target=in_the_fork, args=args)
        self.process.start()
        writer.close()
        self.output = os.fdopen(os.dup(reader.fileno()), errors="replace")

    def wait_for(self, pattern, times=1):
        """Read the output until so many lines match. False where the process ended before."""
        for line in self.output:
            if re.search(pattern, line):
                times -= 1
            if times == 0:
                return True
        return False

    def send(self, signum):
        os.kill(self.process.pid, signum)

    def end(self):
        """Wait for the end. Returns the exit code, which is -9 after SIGKILL, and what is still
        unread of stdout and stderr."""
        rest = self.output.read()
        self.output.close()
        self.process.join()
        return self.process.exitcode, rest


def run_to_end(flags, code=0, **options):
    """A run that ends with this exit code. Returns its output."""
    ended_with, output = Run(flags, **options).end()
    assert ended_with == code, f"exit code {ended_with}: {output}"
    return output


def in_the_fork(writer, torchrun, env, program):
    """What the new process does, with its output going to `writer`."""
    use_screen(os.dup(writer.fileno()))
    writer.close()
    # Otherwise the lock that tqdm makes would outlive a killed process, with a warning at the end.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(env)
    as_in_a_terminal()
    code = 1
    try:
        if torchrun is None:
            code = run_program(*program)
        else:
            run_torchrun(torchrun, program)
            code = 0
    except BaseException:
        traceback.print_exc()
    leave(code)


def as_in_a_terminal():
    """A shell's background jobs ignore Ctrl-C, and what runs under nohup ignores SIGHUP. Neither is
    meant here. And whatever becomes of the test, no process stays behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.alarm(240)


def leave(code):
    """End this process, without the second that Python takes to clear away all of torch."""
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # as Python does
    os._exit(code)


def run_program(flags, prepare, script):
    """Be the program. Returns its exit code."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.modules.pop("train_gpt2", None)  # it reads torchrun's variables when it is imported
    train_gpt2 = importlib.import_module("train_gpt2")
    # Drawing the curves takes as long as a whole run here.
    train_gpt2.draw_curves = do_nothing
    if script:
        importlib.import_module("matplotlib.figure").Figure.savefig = do_nothing
    for call in prepare:
        call()
    if not script:
        return train_gpt2.main(flags)
    sys.argv = ["train_gpt2.py"] + flags
    try:
        runpy.run_path(train_gpt2.__file__, run_name="__main__")
    except SystemExit as end:
        return end.code


def do_nothing(*args, **options):
    pass


def run_torchrun(options, program):
    """Be torchrun, which forks the processes that it would start."""
    from torch.distributed import run

    config_from_args = run.config_from_args

    def forking(args):
        config, _, _ = config_from_args(args)
        config.start_method = "fork"
        return config, run_worker, program

    run.config_from_args = forking
    with tempfile.TemporaryDirectory() as folder:  # torchrun would make one, and leave it there
        run.main(options + [f"--log_dir={folder}", "train_gpt2.py"])


def run_worker(flags, prepare, script):
    """What torchrun's processes do. Where all is well they return, as torchrun waits for that."""
    as_in_a_terminal()
    code = 1
    try:
        code = run_program(flags, prepare, script)
    except BaseException:
        traceback.print_exc()
    if code != 0:
        leave(code)


@dataclass(kw_only=True)
class Trap:
    """Something that happens to a run at a chosen moment: it is killed, or `spring` is called.

    Under torchrun, `rank` and `restart` say to which process it happens.
    """

    spring: Callable | None = None
    rank: int | None = None
    restart: int | None = None

    def __call__(self):
        rank = int(os.environ.get("RANK", 0))
        restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if self.rank in (None, rank) and self.restart in (None, restart):
            self.set()


@dataclass
class At(Trap):
    """Just before the n-th call of a function, or just after it. `spring` gets its arguments."""

    function: str  # as in "os.fsync"
    call: int
    after: bool = False

    def set(self):
        owner_name, name = self.function.rsplit(".", 1)
        owner = pkgutil.resolve_name(owner_name)
        original = getattr(owner, name)
        spring = self.spring or die
        calls = 0

        def trapped(*args, **options):
            nonlocal calls
            calls += 1
            if calls == self.call and not self.after:
                spring(*args)
            result = original(*args, **options)
            if calls == self.call and self.after:
                spring(*args)
            return result

        setattr(owner, name, trapped)


@dataclass
class AtFile(Trap):
    """Just before something happens to a file whose name matches. `event` is what Python calls it
    in its audit events: "os.rename" (whose new name is meant) or "os.remove"."""

    event: str
    name: str

    def set(self):
        sys.addaudithook(self.watch)

    def watch(self, event, args):
        if event != self.event:
            return
        path = args[0]
        if event == "os.rename":
            path = args[1]
        if fnmatch(os.path.basename(path), self.name):
            spring = self.spring or die
            spring(*args)


# What a trap may do. Each is given the arguments of the call that it interrupts.


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def get_signal(signum, *args):
    signal.raise_signal(signum)


def fail(error, *args):
    raise error


def wait(seconds, *args):
    """Say so, and take this long. A signal does not end it."""
    print("waiting", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)


def wait_for_file(path, *args):
    """Say which process waits, and wait until there is this file."""
    # print() writes the line and its end one after the other, and another rank may come between.
    os.write(1, f"waiting {os.getpid()}\n".encode())
    while not os.path.exists(path):
        time.sleep(0.01)


def limit_file_size(size, *args):
    """Let no file grow beyond this many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def die_at_file_size(size, *args):
    """Be killed in the middle of a write, when a file has this many bytes."""
    limit_file_size(size)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def break_weights(optimizer, *args):
    """After a step of the optimiser: make one weight nan."""
    optimizer.param_groups[0]["params"][0].data[5] = float("nan")


def rename(old, new, *args):
    os.rename(old, new)


def slow_down_batches(*args):
    """Let each batch take half a second from now on, and say so."""
    loader = sys.modules["train_gpt2"].DataLoaderLite
    batch = loader.batch

    def slow(self, i):
        print("a batch", flush=True)
        time.sleep(0.5)
        return batch(self, i)

    loader.batch = slow


# What else a run may find when it begins


def use_library(folder):
    """Have the demo trained on this folder instead of Python's library."""
    sysconfig.get_path = lambda name: folder


def lose_pipe():
    """A screen that is a pipe which nobody reads."""
    reader, writer = os.pipe()
    use_screen(writer)
    os.close(reader)


def lose_terminal():
    controller, terminal = os.openpty()
    use_screen(terminal)
    os.close(controller)


def fill_disk():
    """A screen that is a file on a full disk."""
    use_screen(os.open("/dev/full", os.O_WRONLY))


def use_screen(fd):
    """Have stdout and stderr go to this file descriptor, with Python's usual files above them."""
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def ignore_hangups():
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def enter_folder_of_rank():
    """Have each rank see files of its own, as on machines that share no disk."""
    os.chdir(f"rank{os.environ['RANK']}")


def watch_gradients():
    """Save the final weights, when gradients were exchanged, and how many graphs were compiled, to
    rank0.pt and rank1.pt."""
    import torch
    from torch._dynamo.backends.debugging import aot_eager
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    # The same graphs as on a GPU, run as they are
    torch.compile = partial(torch.compile, backend=compile_graph)
    # Several buckets, though the model is small
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 20_000
    events = []

    def exchange(state, bucket):
        events.append("exchange")
        return allreduce_hook(state, bucket)

    class Watched(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, **dict(options, bucket_cap_mb=0.03))
            self.register_comm_hook(None, exchange)
            # The gradient of the first layer is the last to be known.
            first = self.module.transformer.wpe.weight
            first.register_post_accumulate_grad_hook(lambda p: events.append("first-layer"))
            At("torch.distributed.destroy_process_group", 1, spring=self.save)()

        def forward(self, *args):
            events.append("forward")
            return super().forward(*args)

        def save(self):
            result = (self.module.state_dict(), events, len(graphs))
            torch.save(result, f"rank{os.environ['RANK']}.pt")

    torch.nn.parallel.DistributedDataParallel = Watched
