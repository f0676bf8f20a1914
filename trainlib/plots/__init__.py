"""Pictures of runs, drawn from the files of run folders and without a screen.

``draw_run`` draws one run (``curves``, ``classes``, ``numbers``) and its ``per_class.csv``,
``overlay`` several over each other (``comparison``), ``draw_sweep`` a learning-rate sweep;
``report`` puts one run on a page (``page``). ``records`` reads the files, ``paper`` says how all
pictures look, ``names`` makes names fit. ``python -m trainlib.plots RUN [RUN ...]`` does the first
two.
"""

from trainlib.plots.comparison import differences, overlay
from trainlib.plots.records import NotARun
from trainlib.plots.run import draw_run
from trainlib.plots.sweep import draw_sweep

__all__ = ["NotARun", "differences", "draw_run", "draw_sweep", "overlay"]
