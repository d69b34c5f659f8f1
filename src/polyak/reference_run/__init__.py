"""The reference run: recipes, data, models, the loop."""
