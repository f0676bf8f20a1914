"""Where the time of a step goes: ``--profile "20 steps"``.

What a step consists of is told by marks around the objects that it uses (``parts``), which are
there while the profile is taken and not before or after; torch's profiler says which operators run
(``trace``). The loop knows nothing of it, and neither changes a weight."""

from trainlib.profiling.profile import ProfiledSteps, profile_steps

__all__ = ["ProfiledSteps", "profile_steps"]
