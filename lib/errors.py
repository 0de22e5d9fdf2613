"""Errors that a user can cause, and mend: one line, no traceback."""


class UserError(Exception):
    """What is wrong, where (file, row, column, value) and what to do, in one line.

    `./run_all.sh` prints the line and exits with code 2; a notebook shows the line alone.
    """

    def _render_traceback_(self):  # IPython asks an exception for its own rendering
        return [f"Error: {self}"]
