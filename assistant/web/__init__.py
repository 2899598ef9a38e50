"""The web side: FastAPI with the API and one Gradio app for each role. The only place that knows Gradio."""
