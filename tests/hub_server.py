"""A Hub on loopback: the HTTP API as huggingface_hub 2.x uses it for models, in memory, with faults on demand.

Large files (weights, pictures) are redirected to a second host, as the real Hub does, which refuses tokens. The Xet
protocol is not spoken: set ``HF_HUB_DISABLE_XET``.
"""
import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import close_session

LARGE = ('.safetensors', '.png', '.bin')
GIT_ATTRIBUTES = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LARGE).encode()


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool

    @property
    def git(self) -> str:
        return hashlib.sha1(b'blob %d\0' % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.large else self.git


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Dict[str, Blob]
    message: str


@dataclass
class Repo:
    private: bool
    branches: Dict[str, List[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.sha == revision:
                    return commit
        raise Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')


@dataclass
class Fault:
    """What goes wrong with the next requests.

    Attributes:
        request: Matches ``'<METHOD> <path>'``, a regular expression.
        status: Answer with this and do nothing.
        cut: Close the connection after so many bytes of the body, received (PUT) or sent (GET).
        lose: Do what was asked, and close the connection in place of an answer.
        wait: Called before anything is done.
        times: How many requests it hits.
    """
    request: str
    status: int = 0
    cut: Optional[int] = None
    lose: bool = False
    wait: Optional[Callable[[], Any]] = None
    times: int = 1
    headers: Dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = '', **fields: Any):
        super().__init__(message)
        self.status, self.fields = status, {'error': message, **fields}
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}


@dataclass
class Reply:
    status: int = 200
    data: bytes = b''
    headers: Dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, headers: Optional[Dict[str, str]] = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json', **(headers or {})})


class Hub:
    """The state of the Hub and its server; a context manager.

    Attributes:
        users: Owner by token. An owner may write to repos of the same name alone.
        log: Every request, as ``'<METHOD> <path>'`` and its ``Range``.
    """

    def __init__(self, users: Dict[str, str]):
        self.users = users
        self.repos: Dict[str, Repo] = {}
        self.large: Dict[str, bytes] = {}
        self.faults: List[Fault] = []
        self.log: List[Tuple[str, str]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('BoundHandler', (Handler,), {'hub': self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint, self.cdn = f'http://127.0.0.1:{port}', f'http://localhost:{port}'

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commits(self, repo: str, branch: str = 'main') -> List[Commit]:
        return self.repos[repo].branches[branch]

    def files(self, repo: str, branch: str = 'main') -> Dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo].find(branch).files.items()}

    def edit(self, repo: str, path: str, data: bytes) -> None:
        """As somebody does in the browser."""
        commits = self.commits(repo)
        files = {**commits[-1].files, path: Blob(data, False)}
        commits.append(Commit(self._sha(), files, f'Update {path}'))

    def asked(self, request: str) -> List[str]:
        """The ``Range`` of each request so far that matches."""
        return [wanted for line, wanted in self.log if re.match(request, line)]

    def strike(self, line: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.match(fault.request, line):
                    fault.times -= 1
                    return fault
        return Fault('')

    def _sha(self) -> str:
        number = sum(len(commits) for repo in self.repos.values() for commits in repo.branches.values())
        return hashlib.sha1(b'commit %d' % number).hexdigest()

    # What the API does. Each takes the request and returns a reply, or raises Refused.

    def whoami(self, request: 'Handler') -> Reply:
        return as_json({'type': 'user', 'name': self._writer(request), 'orgs': []})

    def create(self, request: 'Handler') -> Reply:
        asked, user = request.json(), self._writer(request)
        name = f'{asked.get("organization") or user}/{asked["name"]}'
        if not name.startswith(f'{user}/'):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace of {name}')
        url = f'{self.endpoint}/{name}'
        if name in self.repos:
            raise Refused(409, 'You already created this model repo', url=url)
        first = Commit(self._sha(), {'.gitattributes': Blob(GIT_ATTRIBUTES, False)}, 'initial commit')
        self.repos[name] = Repo(asked.get('visibility') == 'private', {'main': [first]})
        return as_json({'url': url, 'name': name})

    def validate(self, request: 'Handler') -> Reply:
        match = re.match(r'---\n(.*?)\n---\n', request.json()['content'], re.DOTALL)
        try:
            fine = match and isinstance(yaml.safe_load(match[1]), dict)
        except yaml.YAMLError:
            fine = False
        if match and not fine:
            return as_json({'errors': [{'message': 'not a mapping'}], 'warnings': []}, 400)
        return as_json({'errors': [], 'warnings': [] if match else [{'message': 'empty or missing yaml metadata'}]})

    def info(self, request: 'Handler', repo: str, revision: Optional[str] = None) -> Reply:
        found = self._readable(request, repo)
        commit = found.find(revision or 'main')
        siblings = [{'rfilename': path} for path in commit.files]
        return as_json({'id': repo, 'sha': commit.sha, 'private': found.private, 'siblings': siblings, 'tags': []})

    def tree(self, request: 'Handler', repo: str, revision: str) -> Reply:
        entries = []
        for path, blob in self._readable(request, repo).find(revision).files.items():
            large = {'lfs': {'oid': blob.etag, 'size': len(blob.data), 'pointerSize': 134}} if blob.large else {}
            entries.append({'type': 'file', 'path': path, 'oid': blob.git, 'size': len(blob.data), **large})
        return as_json(entries)

    def branch(self, request: 'Handler', repo: str, revision: str) -> Reply:
        found = self._writable(request, repo)
        if revision in found.branches:
            raise Refused(409, 'Reference already exists')
        start = found.find(request.json().get('startingPoint', 'main'))
        found.branches[revision] = [start]
        return as_json({})

    def preupload(self, request: 'Handler', repo: str, revision: str) -> Reply:
        theirs = self._target(request, repo).find(revision).files
        return as_json({'files': [{
            'path': entry['path'],
            'uploadMode': 'lfs' if entry['path'].endswith(LARGE) else 'regular',
            'shouldIgnore': False,
            'oid': theirs[entry['path']].etag if entry['path'] in theirs else None,
        } for entry in request.json()['files']]})

    def commit(self, request: 'Handler', repo: str, revision: str) -> Reply:
        found = self._target(request, repo)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header, parent = lines[0]['value'], found.find(revision)
        if header.get('parentCommit', parent.sha) != parent.sha:
            raise Refused(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(parent.files)
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']), False)
            elif value['oid'] in self.large:
                files[value['path']] = Blob(self.large[value['oid']], True)
            else:
                raise Refused(400, f'The object of {value["path"]} was not uploaded')
        made = Commit(self._sha(), files, header['summary'])
        pull_request = None
        if 'create_pr' in request.query:
            number = 1 + sum(branch.startswith('refs/pr/') for branch in found.branches)
            found.branches[f'refs/pr/{number}'] = [parent, made]
            pull_request = f'{self.endpoint}/{repo}/discussions/{number}'
        else:
            found.branches[revision].append(made)
        url = f'{self.endpoint}/{repo}/commit/{made.sha}'
        return as_json({'commitUrl': url, 'commitOid': made.sha, 'pullRequestUrl': pull_request})

    def batch(self, request: 'Handler', repo: str) -> Reply:
        self._target(request, repo)
        objects = []
        for entry in request.json()['objects']:
            href = f'{self.cdn}/large/{entry["oid"]}'
            verify = {'href': f'{self.endpoint}/api/verify/{entry["oid"]}'}
            actions = {} if entry['oid'] in self.large else {'actions': {'upload': {'href': href}, 'verify': verify}}
            objects.append({**entry, **actions})
        return as_json({'transfer': 'basic', 'objects': objects})

    def verify(self, request: 'Handler', oid: str) -> Reply:
        if len(self.large.get(oid, b'')) != request.json()['size']:
            raise Refused(404, 'Object not found')
        return as_json({})

    def upload(self, request: 'Handler', oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, 'The content does not match its hash')
        self.large[oid] = request.body
        return Reply()

    def resolve(self, request: 'Handler', repo: str, revision: str, path: str) -> Reply:
        commit = self._readable(request, repo).find(revision)
        if path not in commit.files:
            error = Refused(404, 'Entry not found', 'EntryNotFound')
            error.headers['X-Repo-Commit'] = commit.sha
            raise error
        blob, headers = commit.files[path], {'X-Repo-Commit': commit.sha}
        if not blob.large:
            return Reply(200, blob.data, {**headers, 'ETag': f'"{blob.etag}"'})
        linked = {'X-Linked-Etag': f'"{blob.etag}"', 'X-Linked-Size': str(len(blob.data))}
        return Reply(302, b'', {**headers, **linked, 'Location': f'{self.cdn}/large/{blob.etag}'})

    def download(self, request: 'Handler', oid: str) -> Reply:
        if oid not in self.large:
            raise Refused(404, 'Object not found')
        data = self.large[oid]
        match = re.match(r'bytes=(\d+)-$', request.headers.get('Range', ''))
        if not match:
            return Reply(200, data, {'Accept-Ranges': 'bytes'})
        start = int(match[1])
        return Reply(206, data[start:], {'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'})

    def _user(self, request: 'Handler') -> Optional[str]:
        token = request.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in self.users:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return self.users.get(token)

    def _writer(self, request: 'Handler') -> str:
        user = self._user(request)
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        return user

    def _readable(self, request: 'Handler', repo: str) -> Repo:
        user = self._user(request)
        found = self.repos.get(repo)
        if found is None or (found.private and repo.split('/')[0] != user):
            raise Refused(404 if user else 401, 'Repository not found', 'RepoNotFound')
        return found

    def _writable(self, request: 'Handler', repo: str) -> Repo:
        found = self._readable(request, repo)
        if self._writer(request) != repo.split('/')[0]:
            raise Refused(403, f'Your token has no write permission on {repo}')
        return found

    def _target(self, request: 'Handler', repo: str) -> Repo:
        """Anybody who may read may open a pull request; the batch of its files is asked for without a branch."""
        proposed = 'create_pr' in request.query or (request.path.endswith('batch') and 'ref' not in request.json())
        return self._readable(request, repo) if proposed else self._writable(request, repo)


_REPO, _REVISION = r'/(?P<repo>[^/]+/[^/]+?)', r'/(?P<revision>[^/]+)'
_ROUTES = tuple((re.compile(request), handle) for request, handle in (
    (r'GET /api/whoami-v2', Hub.whoami),
    (r'POST /api/repos/create', Hub.create),
    (r'POST /api/validate-yaml', Hub.validate),
    (rf'GET /api/models{_REPO}(?:/revision{_REVISION})?', Hub.info),
    (rf'GET /api/models{_REPO}/tree{_REVISION}', Hub.tree),
    (rf'POST /api/models{_REPO}/branch{_REVISION}', Hub.branch),
    (rf'POST /api/models{_REPO}/preupload{_REVISION}', Hub.preupload),
    (rf'POST /api/models{_REPO}/commit{_REVISION}', Hub.commit),
    (rf'POST {_REPO}\.git/info/lfs/objects/batch', Hub.batch),
    (r'POST /api/verify/(?P<oid>\w+)', Hub.verify),
    (rf'(?:GET|HEAD) {_REPO}/resolve{_REVISION}/(?P<path>.+)', Hub.resolve),
    (r'PUT /large/(?P<oid>\w+)', Hub.upload),
    (r'(?:GET|HEAD) /large/(?P<oid>\w+)', Hub.download),
))


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and body are two packets
    hub: Hub

    def json(self) -> Any:
        return json.loads(self.body)

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        line = f'{self.command} {split.path}'
        self.hub.log.append((line, self.headers.get('Range', '')))
        fault = self.hub.strike(line)
        length = int(self.headers.get('Content-Length', 0))
        self.body = self.rfile.read(length if fault.cut is None else min(fault.cut, length))
        if fault.wait:
            fault.wait()
        if fault.status:
            return self._send(as_json({'error': f'status {fault.status} as asked'}, fault.status, fault.headers))
        if fault.cut is not None and self.command != 'GET':
            return self._cut()
        reply = self._reply(line)
        if fault.lose:
            return self._cut()
        self._send(reply, fault.cut)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _reply(self, line: str) -> Reply:
        at_cdn = self.headers['Host'].startswith('localhost')
        try:
            if at_cdn and 'Authorization' in self.headers:
                raise Refused(400, 'A token was sent to a host that is not the Hub')
            for pattern, handle in _ROUTES:
                match = pattern.fullmatch(line)
                if match:
                    named = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    with self.hub.lock:
                        return handle(self.hub, self, **named)
            raise Refused(404, f'no route for {line}')
        except Refused as e:
            return as_json(e.fields, e.status, e.headers)

    def _send(self, reply: Reply, cut: Optional[int] = None) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, 'Content-Length': str(len(reply.data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(reply.data[:cut])
        if cut is not None:
            self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True


class Clock:
    """Stands in for ``time`` where a client waits before it tries again."""

    def __init__(self) -> None:
        self.slept: List[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def connect(monkeypatch: Any, hub: Hub, home: Path, token: str) -> Clock:
    """Have huggingface_hub, in this process, know no other Hub; its cache and token file are in ``home``."""
    for name, value in {
        'ENDPOINT': hub.endpoint,
        'HUGGINGFACE_CO_URL_TEMPLATE': hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_CACHE': str(home / 'hub'),
        'HF_TOKEN_PATH': str(home / 'token'),
        'HF_HUB_DISABLE_XET': True,
        'HF_HUB_OFFLINE': False,
    }.items():
        monkeypatch.setattr(f'huggingface_hub.constants.{name}', value)
    monkeypatch.setenv('HF_TOKEN', token)
    monkeypatch.setenv('NO_PROXY', '*')
    close_session()  # a client keeps the proxies that it was made with
    clock = Clock()
    for module in ('huggingface_hub.utils._http', 'huggingface_hub.file_download', 'timm_epfs.hub.push'):
        monkeypatch.setattr(f'{module}.time', clock)
    return clock
