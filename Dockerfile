# CPU only (never built yet): docker build -t ct_audio . ; docker run --shm-size=1g -v "$PWD:/work" ct_audio train kathleen/wavenet_small
FROM python:3.12-slim
WORKDIR /source
COPY . .
RUN python -m pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.12" "torchaudio>=2.11,<2.12" \
    && python -m pip install --no-cache-dir --constraint requirements.lock '.[av]'
RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["ct-audio"]
CMD ["doctor"]
