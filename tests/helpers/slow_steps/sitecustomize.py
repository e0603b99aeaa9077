"""In PYTHONPATH of a test's programs: every step takes a while, so that nobody has to hurry to hit it."""

import os
import time

if pause := os.environ.get("DIST_MOE_TEST_STEP_S"):
    from dist_moe.engine.steps.crew import Crew

    run = Crew.run

    def slow_run(self, *arguments):
        time.sleep(float(pause))
        return run(self, *arguments)

    Crew.run = slow_run

if load := os.environ.get("DIST_MOE_TEST_LOAD_S"):
    from dist_moe.model.transformer import Transformer

    def slow_start(*arguments):
        os.write(2, b"loading slowly\n")
        time.sleep(float(load))

    Transformer.__init__ = slow_start
