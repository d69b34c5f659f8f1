"""Figures and the page: the only room that draws."""
