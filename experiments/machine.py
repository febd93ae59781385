"""What computes: the processor by name."""

import platform


def processor() -> str:
    """The processor's name; on Linux with its model number, since virtual machines shorten names."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = dict(map(str.strip, line.split(":", 1)) for line in file.read().split("\n\n")[0].splitlines())
        return f"{first['model name']} (family {first['cpu family']}, model {first['model']})"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()
