namespace Vmm.Core.Errors;

/// <summary>
/// A QMP error: what a server answers for a command, and what a client throws for such an answer (qmp 3). The errno is EINVAL,
/// whatever the class.
/// </summary>
public sealed class QmpErrorException : VmmException
{
    /// <summary>Makes an error of a class this product knows.</summary>
    /// <param name="errorClass">The class.</param>
    /// <param name="description">The text for a person.</param>
    public QmpErrorException(QmpErrorClass errorClass, string description) : this(errorClass.ToString(), description)
    {
    }

    /// <summary>Makes an error of the class <see cref="QmpErrorClass.GenericError"/>.</summary>
    /// <param name="description">The text for a person.</param>
    public QmpErrorException(string description) : this(QmpErrorClass.GenericError, description)
    {
    }

    /// <summary>Makes an error from a peer's answer.</summary>
    /// <param name="className">The class as sent; an unknown one counts as <see cref="QmpErrorClass.GenericError"/>.</param>
    /// <param name="description">The text as sent.</param>
    public QmpErrorException(string className, string description)
        : base(description, null, Errno.EINVAL, Enum.TryParse(className, out QmpErrorClass known) ? known : QmpErrorClass.GenericError) => ClassName = className;

    /// <summary>The class as it is on the wire.</summary>
    public string ClassName { get; }
}
