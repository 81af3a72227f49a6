using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// A connection on its way from one process to the next: socket, twin socket and transcript, under the device's id in the VM's table of
/// descriptors. Descriptors: <c>ID_vfio-user</c> 0 the socket, 1 the twin, 2 a memfd with the transcript; <c>ID_vfio-user-fd</c> N those of replies.
/// </summary>
/// <param name="Socket">The connection.</param>
/// <param name="Twin">The server's DMA socket, or null.</param>
/// <param name="Transcript">What the server answered when the device was opened.</param>
internal sealed record VfioUserHandover(OwnedFd Socket, OwnedFd? Twin, VfioUserTranscript Transcript)
{
    /// <summary>Takes over the connection of the process before this one.</summary>
    /// <exception cref="VmmException">It was not handed over, or the transcript is malformed.</exception>
    internal static VfioUserHandover Take(CprFdTable table, string id)
    {
        string name = Name(id);
        OwnedFd socket = table.Require(name, 0);
        OwnedFd? twin = table.Take(name, 1);
        try
        {
            using OwnedFd memory = table.Require(name, 2);
            Posix.Stat(memory, out FileStatus stat);
            if (stat.SizeBytes is <= 0 or > VfioUserLimits.TranscriptBytes)
                throw new StreamLimitException($"device '{id}': a transcript of {stat.SizeBytes} bytes, at most {VfioUserLimits.TranscriptBytes} are taken");
            byte[] bytes = new byte[stat.SizeBytes];
            if (Posix.PRead(memory, bytes, 0, out Errno errno) != bytes.Length) throw Posix.Error($"device '{id}': transcript", errno);
            return new VfioUserHandover(socket, twin, VfioUserTranscript.Parse(bytes, n => table.Require(FdName(id), n)));
        }
        catch
        {
            socket.Dispose();
            twin?.Dispose();
            throw;
        }
    }

    /// <summary>Adds a connection to the table.</summary>
    /// <returns>The entries; dispose them before the connection.</returns>
    internal IReadOnlyList<IDisposable> Enter(CprFdTable table, string id)
    {
        byte[] bytes = Transcript.ToBytes();
        OwnedFd memory = Posix.MemFd($"vmm-{Name(id)}", bytes.Length);
        if (Posix.PWrite(memory, bytes, 0, out Errno errno) != bytes.Length)
        {
            memory.Dispose();
            throw Posix.Error($"device '{id}': transcript", errno);
        }
        List<IDisposable> entered = [memory, table.Save(Name(id), 0, Socket), table.Save(Name(id), 2, memory)];
        if (Twin is not null) entered.Add(table.Save(Name(id), 1, Twin));
        for (int i = 0; i < Transcript.Fds.Count; i++) entered.Add(table.Save(FdName(id), i, Transcript.Fds[i]));
        return entered;
    }

    private static string Name(string id) => $"{id}_vfio-user";

    private static string FdName(string id) => $"{id}_vfio-user-fd";
}
