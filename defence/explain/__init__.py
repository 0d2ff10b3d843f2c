"""Results for people: flagged images, their trigger, pages, plots, tables; judging on Ray."""
