"""Settings as frozen dataclasses: each field is a widget, a check, a default and a line of docs. No torch."""
