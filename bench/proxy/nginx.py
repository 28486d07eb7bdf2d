"""Where nginx is: the one that is installed, else Debian's package, unpacked into the cache folder. Nothing is
installed on the system, and no service is started."""

import glob
import os
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import peers  # noqa: E402

HOW = "nginx is missing: install the package nginx (Debian and Ubuntu: apt-get install nginx-light)"


def nginx():
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found:
        return found
    folder = os.path.join(peers.cache(), "nginx")
    binary, marker = os.path.join(folder, "usr", "sbin", "nginx"), os.path.join(folder, "complete")
    if not os.path.exists(marker):
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise peers.Missing(HOW)
        print("bench-proxy: unpacking nginx (once)", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 300}
        if subprocess.run(["apt-get", "download", "nginx"], **quiet, check=False).returncode:
            subprocess.run(["apt-get", "update"], **quiet, check=False)
            subprocess.run(["apt-get", "download", "nginx"], **quiet, check=False)
        for package in glob.glob(os.path.join(folder, "nginx_*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, folder], **quiet, check=False)
        if not runs(binary):
            raise peers.Missing(HOW)
        with open(marker, "w", encoding="utf-8"):
            pass
    return binary


def runs(binary):
    """Whether it is there and finds its libraries."""
    try:
        return subprocess.run([binary, "-v"], capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        return False


def version(binary):
    text = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=30, check=False).stderr
    return text.strip().rpartition("/")[2]
