"""How wrong the forecast is: published runs against predictions, beside trivial baselines."""
