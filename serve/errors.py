"""Everything Lathe raises on purpose, in one tree. A test keeps this drawing true.

LatheError                        500 internal_error
├── ConfigError (ValueError)      400 invalid_config
├── DataError (ValueError)        400 invalid_data
├── ModelError (ValueError)       400 invalid_model
├── ModelLoadError (RuntimeError) 503 model_load_failed
├── AdapterError (ValueError)     400 invalid_adapter
├── AdapterMemoryError (MemoryError) 507 adapter_memory
├── AdapterGoneError (LookupError) 410 adapter_gone
├── RequestError (ValueError)     400 invalid_request_error
│   └── ContextLengthError        400 context_length_exceeded
├── NotFoundError (LookupError)   404 model_not_found
│   └── ResponseNotFoundError     404 response_not_found
├── AuthenticationError (PermissionError) 401 invalid_api_key
├── ForbiddenError (PermissionError) 403 forbidden
├── OverloadedError (RuntimeError) 503 overloaded
│   ├── TenantLimitError          429 rate_limit_exceeded
│   └── DrainingError             503 draining
├── DeadlineError (TimeoutError)  504 deadline_exceeded
├── StoppedError (RuntimeError)   503 engine_stopped
├── GenerationError (RuntimeError) 500 generation_failed
├── ToolServerError (RuntimeError) 424 tool_server_failed
├── TrainingError (RuntimeError)  500 training_failed
└── StorageError (OSError)        507 storage_failed
"""

from __future__ import annotations


class LatheError(Exception):
    """Base of the tree. `status` and `code` are what an HTTP client sees; messages may have lines."""

    status = 500
    code = "internal_error"


class ConfigError(LatheError, ValueError):
    """A recipe, serving config or command line that cannot be used; the message lists every problem."""

    status = 400
    code = "invalid_config"


class DataError(LatheError, ValueError):
    """A data row or file that cannot be used; the message names file and line."""

    status = 400
    code = "invalid_data"


class ModelError(LatheError, ValueError):
    """A base model that cannot be loaded or driven; the message names the model and the part."""

    status = 400
    code = "invalid_model"


class ModelLoadError(LatheError, RuntimeError):
    """A base that the server is to have and could not load; the next request has it tried again. `problem` is why."""

    status = 503
    code = "model_load_failed"

    def __init__(self, message: str, problem: LatheError | None = None) -> None:
        super().__init__(message)
        self.problem = problem


class AdapterError(LatheError, ValueError):
    """An adapter that is unreadable, does not fit the base, or clashes with a loaded name."""

    status = 400
    code = "invalid_adapter"


class AdapterMemoryError(LatheError, MemoryError):
    """An adapter for which there is no memory left; what is loaded stays as it is."""

    status = 507
    code = "adapter_memory"


class AdapterGoneError(LatheError, LookupError):
    """A version that is known, and whose content is nowhere any more; the message says where it was looked for."""

    status = 410
    code = "adapter_gone"


class RequestError(LatheError, ValueError):
    """A request that cannot be served as asked. `param` is the field at fault."""

    status = 400
    code = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """The prompt leaves no room in the context for an answer. Clients know it by "maximum context length is"."""

    code = "context_length_exceeded"


class NotFoundError(LatheError, LookupError):
    """No model, adapter, experiment or file of that name."""

    status = 404
    code = "model_not_found"


class ResponseNotFoundError(NotFoundError):
    """No response of that id: it was never stored, or is stored no more."""

    code = "response_not_found"
    param: str | None = "response_id"


class AuthenticationError(LatheError, PermissionError):
    """A request without a key that this server knows."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(LatheError, PermissionError):
    """The server does not read that path, or not for that key."""

    status = 403
    code = "forbidden"


class OverloadedError(LatheError, RuntimeError):
    """The queue is full; try again after `retry_after_s`."""

    status = 503
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TenantLimitError(OverloadedError):
    """One tenant, or one key, asks for more than it may; others are served."""

    status = 429
    code = "rate_limit_exceeded"


class DrainingError(OverloadedError):
    """The server is about to end, and takes nothing new."""

    code = "draining"


class DeadlineError(LatheError, TimeoutError):
    """The time in which a request wanted its answer has passed."""

    status = 504
    code = "deadline_exceeded"


class StoppedError(LatheError, RuntimeError):
    """The engine has stopped, by request or by a failure named in the message."""

    status = 503
    code = "engine_stopped"


class GenerationError(LatheError, RuntimeError):
    """One row could not go on (not-a-number logits, text that cannot be read); the others are untouched."""

    code = "generation_failed"


class ToolServerError(LatheError, RuntimeError):
    """An MCP server that a request asks for does not answer."""

    status = 424
    code = "tool_server_failed"


class TrainingError(LatheError, RuntimeError):
    """A run that had to end: a non-finite loss, nothing to train, nothing to resume."""

    code = "training_failed"


class StorageError(LatheError, OSError):
    """A file could not be written; what was there before is whole."""

    status = 507
    code = "storage_failed"
