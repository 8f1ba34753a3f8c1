"""The versions of TRL whose internals were read and tested."""

from importlib.metadata import version

KNOWN_VERSIONS = ("1.16.0",)


def check_version() -> None:
    """Raise ImportError, naming the known versions, if the installed TRL is another one."""
    installed = version("trl")
    if installed not in KNOWN_VERSIONS:
        known = ", ".join(KNOWN_VERSIONS)
        raise ImportError(
            f"trl {installed} is not known to this integration: install trl=={known} "
            f"(opsd_kernels.integrations.trl replaces functions inside TRL)"
        )
