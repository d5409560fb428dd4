# vLLM's OpenAI server with the plugin: docker run --gpus all -p 8000:8000 vllm-longmamba state-spaces/mamba-1.4b
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}

WORKDIR /opt/vllm-longmamba
COPY pyproject.toml README.md LICENSE ./
COPY vllm_longmamba vllm_longmamba
COPY kernels kernels
COPY tables tables
# vLLM is in the image: its extra is left out.
RUN uv pip install --system --no-cache . && rm -rf build ./*.egg-info

WORKDIR /
EXPOSE 8000
# A large model takes minutes to load and to compile.
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/health', timeout=5)"]
ENTRYPOINT ["vllm", "serve", "--model-impl", "longmamba"]
CMD ["state-spaces/mamba-1.4b"]
