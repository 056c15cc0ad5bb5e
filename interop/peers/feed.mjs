// A backend that says the same to everybody, and its watchers, both on npm `ws`: `feed.mjs serve PORT`, and `feed.mjs client`, driven by lines
// on stdin (lines.mjs). /connections tells how many WebSockets there are and were, /refused refuses. SIGTERM ends the backend as a deploy does:
// Close 1001 to all, then the process.
import { createServer } from 'node:http';
import WebSocket, { WebSocketServer } from 'ws';
import { serve } from './lines.mjs';

const [, , role, port] = process.argv;

if (role === 'serve') {
    const say = (fields) => console.log(JSON.stringify(fields));
    let opened = 0;
    const server = new WebSocketServer({ noServer: true, perMessageDeflate: true });
    const http = createServer((request, response) => {
        response.end(JSON.stringify({ open: server.clients.size, opened }));
    });
    http.on('upgrade', (request, socket, head) => {
        if (request.url === '/refused') {
            socket.end('HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n');
            return;
        }
        server.handleUpgrade(request, socket, head, (websocket) => {
            opened += 1;
            say({ event: 'open', nth: opened, cookie: request.headers.cookie ?? null });
            websocket.on('message', (data) => say({ event: 'heard', text: data.toString() }));
            websocket.on('close', (code) => say({ event: 'close', code }));
        });
    });

    // All connections say the same numbers at the same time, from one on that no earlier process has said.
    let number = Date.now();
    setInterval(() => {
        number += 1;
        for (const websocket of server.clients) websocket.send(JSON.stringify({ number }));
    }, 20);

    process.on('SIGTERM', () => {
        http.close();
        for (const websocket of server.clients) websocket.close(1001, 'a new release');
        setTimeout(() => process.exit(0), 1000);
    });

    http.listen(Number(port), '127.0.0.1', () => say({ event: 'listening' }));
} else {
    let watchers = [];
    let news = () => {};

    class Watcher {
        last = null;
        gaps = 0;
        // Messages since the last gap.
        run = 0;
        end = null;

        constructor(url, protocols) {
            const websocket = new WebSocket(url, protocols);
            this.opened = new Promise((resolve, reject) => {
                websocket.on('open', () => resolve({ protocol: websocket.protocol, extensions: websocket.extensions }));
                websocket.on('error', reject);
            });
            websocket.on('message', (data) => {
                const { number } = JSON.parse(data);
                const follows = this.last === null || number === this.last + 1;
                this.gaps += follows ? 0 : 1;
                this.run = follows ? this.run + 1 : 1;
                this.last = number;
                news();
            });
            websocket.addEventListener('close', ({ code, wasClean }) => {
                this.end = { code, clean: wasClean };
                news();
            });
        }
    }

    const until = async (isSo) => {
        while (!watchers.every(isSo)) await new Promise((resolve) => (news = resolve));
    };

    await serve({
        open({ url, protocols, count }) {
            watchers = Array.from({ length: count }, () => new Watcher(url, protocols));
            return Promise.all(watchers.map((each) => each.opened));
        },

        // Until each has heard so many without a gap, after so many gaps, or has ended. How many gaps each has met.
        async hear({ count, gaps }) {
            await until((each) => each.end || (each.gaps >= gaps && each.run >= count));
            return watchers.map((each) => (each.end ? JSON.stringify(each.end) : each.gaps));
        },

        async ends() {
            await until((each) => each.end);
            return watchers.map((each) => each.end);
        },
    });
}
