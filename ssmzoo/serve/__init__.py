"""An HTTP server with OpenAI's routes: ``ssmzoo serve``. It needs FastAPI and uvicorn, the extra ``serve``."""

from ssmzoo.serve.app import Service, create_app
from ssmzoo.serve.limits import Limits
from ssmzoo.serve.prompts import Prompter
from ssmzoo.serve.running import Server, listen, run
from ssmzoo.serve.worker import Worker

__all__ = ["Limits", "Prompter", "Server", "Service", "Worker", "create_app", "listen", "run"]
