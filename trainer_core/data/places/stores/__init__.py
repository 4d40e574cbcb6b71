"""Places with files that are listed and downloaded, one file for each protocol, and the requests behind them."""
