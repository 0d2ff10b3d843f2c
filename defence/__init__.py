"""The parts behind repair.py and eval_defence.py, one idea a file; README has the map."""
