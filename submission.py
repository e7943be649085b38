"""The challenge's files: write a submission, or check one. Templates and rules: docs/submission.md.

    python submission.py --task va --template FILE --out predictions.txt                    # from the run
    python submission.py --task va --template FILE --out predictions.txt --predictions predictions.csv
    python submission.py --task va --template FILE --check predictions.txt                  # anybody's

A template names the frames of the test set. Each of its rows gets the values of its frame, in the template's
order: from the run's trained task and features, or from a table of predict.py. Valence and arousal are
clipped to -1 to 1; the expression is the most probable one; an action unit is 1 if its probability is above
0.5.

--check says that a submission is right (exit code 0), or names its first wrong line, how many more are wrong,
and how (exit code 2). It needs no torch.
"""

import sys

from config import from_command_line
from labels import TASKS
from submission_check import check
from submission_file import read_template

if __name__ == "__main__":
    config, options = from_command_line(
        __doc__,
        task={"choices": list(TASKS), "required": True, "help": "which challenge"},
        template={"required": True, "metavar": "FILE", "help": "names the frames, in order"},
        out={"default": "", "metavar": "FILE", "help": "the submission to write"},
        predictions={"default": "", "metavar": "FILE", "help": "values from this table, not from the run"},
        check={"default": "", "metavar": "FILE", "help": "a submission to check; nothing is written"},
        smooth={"type": int, "default": 0, "metavar": "K", "help": "mean over K frames before and after"})
    task = TASKS[options.task]
    if bool(options.out) == bool(options.check):
        print("error: give either --out, to write a submission, or --check, to check one", file=sys.stderr)
        sys.exit(2)
    if options.check:
        try:
            print(check(options.check, read_template(options.template, task), task))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    else:                                          # only this needs torch
        import submission_values
        from distributed import launch
        launch(submission_values.main, config, task, options)
