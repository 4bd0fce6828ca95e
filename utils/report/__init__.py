"""Plots, tables, pictures and the page that show a run; each module is one kind of view."""
