"""Settings that all tests share."""

from hypothesis import settings

# No deadline: the first example of a test may compile a kernel, and the machine may be busy.
settings.register_profile("nnserve", deadline=None)
settings.load_profile("nnserve")
