"""Commands, and the undoing of what they did.

Whatever is made (mounts, loop devices, daemons, files) is pushed on an ExitStack in the same breath, so that it goes away in the
reverse order: at the end, on failure, and on Ctrl-C or SIGTERM, which both become exceptions.
"""

import os
import shutil
import signal
import subprocess
import time


class NotRun(Exception):
    """A case or one side of it cannot run here. The reason goes into the table."""


def run(*words, timeout_seconds=600, **options):
    """Runs a command to its end and answers what it printed. A failure is NotRun, with the last line that it said."""
    words = [str(word) for word in words]
    try:
        done = subprocess.run(words, check=False, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=timeout_seconds, **options)
    except FileNotFoundError as error:
        raise NotRun(f"{words[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"{' '.join(words[:3])} did not end within {timeout_seconds} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise NotRun(f"{' '.join(words[:3])}: {said[-1]}")
    return done.stdout.strip()


def run_group(words, timeout_seconds, **options):
    """Runs a command that starts others, and answers all that it printed, whatever it came to. What it started ends with us."""
    process = subprocess.Popen(words, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, **options)
    try:
        return process.communicate(timeout=timeout_seconds)[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        raise


def attempt(*words):
    """Runs a command of the undoing: what fails is said, and the undoing goes on."""
    try:
        run(*words, timeout_seconds=60)
        return True
    except NotRun as error:
        print(f"bench: undoing: {error}", flush=True)
        return False


def require(*programs):
    """Fails with the reason when a program is missing."""
    for program in programs:
        if not shutil.which(program):
            raise NotRun(f"{program} is not installed")


def wait_until(condition, what, seconds=30, pause_seconds=0.02):
    """Waits for a condition. Not for something that is measured."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotRun(f"{what}: not within {seconds} s")
        time.sleep(pause_seconds)


def end_process(process, seconds=15):
    """Ends a process that we started, kindly at first."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(seconds)


def unmount(directory):
    """Unmounts. Somebody may have it open for a moment."""
    for _ in range(50):
        if not os.path.ismount(directory):
            return
        done = subprocess.run(["umount", directory], check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    attempt("umount", "-l", directory)


def make_directory(*parts):
    """A directory, made if need be."""
    path = os.path.join(*parts)
    os.makedirs(path, exist_ok=True)
    return path


def end_by_exception():
    """Has signals unwind the stacks. SIGINT too: where a shell has started this in the background it would be ignored."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number, _frame):
        # A second one would break the undoing off, and leave devices behind.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in numbers:
        signal.signal(number, stop)


def drop_caches():
    """Writes out and forgets the page cache, dentries and inodes."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")
