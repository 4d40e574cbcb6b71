"""Every chart and sheet that is drawn with Pillow."""
