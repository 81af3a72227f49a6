using System.Net.Sockets;

namespace Vmm.Tests.Lab;

/// <summary>
/// A relay on the main channel between the two processes of an update. It holds back the old process's stream behind the file header until
/// <see cref="Give"/>. Answers of the new process pass at once.
/// </summary>
internal sealed class LabRelay : IDisposable
{
    /// <summary>Bytes of magic and version. They pass at once, because a listening process closes a connection on which nothing comes.</summary>
    private const int Head = 8;

    private static readonly TimeSpan s_quiet = TimeSpan.FromMilliseconds(500);
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly string _path;
    private readonly MemoryStream _kept = new();
    private Socket? _old, _new;
    private Task? _answers, _rest;

    /// <summary>Listens in place of the new process.</summary>
    /// <param name="path">The socket to which the old process connects; the new process listens at this path with <c>-next</c> appended.</param>
    internal LabRelay(string path)
    {
        _path = path;
        _listener.Bind(new UnixDomainSocketEndPoint(path));
        _listener.Listen(1);
    }

    /// <summary>Start of the script that runs the new process: it changes the arguments, so that the new process listens at the other path.</summary>
    internal const string Script = """
        for a; do shift; case "$a" in *'"channel-type":"main"'*) a=$(echo "$a" | sed 's/\.main"/.main-next"/');; esac; set -- "$@" "$a"; done

        """;

    /// <summary>Receives from the old process until it has sent nothing for a while and a condition holds.</summary>
    internal async Task Keep(Func<bool> isAll, TimeSpan deadline)
    {
        using var limit = new CancellationTokenSource(deadline);
        _old = await _listener.AcceptAsync(limit.Token);
        _new = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        await _new.ConnectAsync(new UnixDomainSocketEndPoint(_path + "-next"), limit.Token);
        _answers = Pass(_new, _old);
        byte[] bytes = new byte[1 << 16];
        while (true)
        {
            if (_old.Poll(s_quiet, SelectMode.SelectRead))
            {
                int n = _old.Receive(bytes);
                if (n == 0) throw new InvalidDataException("the old process ended its stream");
                if (_kept.Length < Head) await _new.SendAsync(bytes.AsMemory(0, (int)Math.Min(n, Head - _kept.Length)));
                _kept.Write(bytes, 0, n);
            }
            else if (_kept.Length > 0 && isAll())
            {
                break;
            }
            limit.Token.ThrowIfCancellationRequested();
        }
        _rest = Pass(_old, _new);
    }

    /// <summary>Sends the held bytes to the new process.</summary>
    /// <param name="withoutLast">Count of bytes at the end that are not sent.</param>
    internal async Task Give(int withoutLast = 0) => await _new!.SendAsync(_kept.ToArray().AsMemory(Head, (int)_kept.Length - Head - withoutLast));

    public void Dispose()
    {
        _listener.Dispose();
        _old?.Dispose();
        _new?.Dispose();
        File.Delete(_path);
    }

    private static async Task Pass(Socket from, Socket to)
    {
        try
        {
            byte[] bytes = new byte[1 << 12];
            for (int n; (n = await from.ReceiveAsync(bytes)) > 0;) await to.SendAsync(bytes.AsMemory(0, n));
            to.Shutdown(SocketShutdown.Send);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // One of the two processes has ended.
        }
    }
}
