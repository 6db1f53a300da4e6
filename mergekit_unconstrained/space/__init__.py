"""The Space: merging in a browser. app.py draws; everything else here knows nothing of Gradio."""
