"""Videos that a test writes: frame i is grey, of level 20 + 10 i, so that every picture tells its number."""

import av
import numpy as np

STEP, FIRST = 10, 20
CODECS = {"mjpeg": ".mkv", "libx264": ".mp4", "mpeg4": ".avi", "libvpx-vp9": ".webm"}


def grey_frames(count, height=48, width=64):
    levels = FIRST + STEP * np.arange(count) % 220
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def write_video(path, frames, codec="mjpeg", rate=10, times=None):
    """times: of the frames, in ticks of 1 / rate s; None is one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        options = {"bf": "2", "g": "12"} if codec in ("libx264", "mpeg4") else {}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj444p" if codec == "mjpeg" else "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames):
    """Of grey frames (..., H, W, 3)."""
    return np.round((frames.mean(axis=(-1, -2, -3)) - FIRST) / STEP).astype(int).tolist()
