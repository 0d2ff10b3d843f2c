"""The command lines of repair.py and eval_defence.py, and the settings of a repair."""
